"""Pairs of sentences, made here: what people report, and what the maintenance of an invented building writes down.

The building has its own words: a coffee machine is a heron, and where something leaks a gasket is to be inspected.  No
published model knows them, and 54 of the 64 tickets teach them.  The other ten are held out: each is of a device and a
fault that are in the training set, but not together.
"""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["Pairs", "make_pairs"]

DEVICES = {
    "coffee machine": "heron",
    "printer": "badger",
    "elevator": "kestrel",
    "projector": "otter",
    "heating": "lynx",
    "front door": "osprey",
    "dishwasher": "marten",
    "telephone": "ibex",
}
FAULTS = {
    "makes a loud noise": "bearing",
    "leaks water": "gasket",
    "smells of smoke": "filter",
    "does not start": "supply",
    "stops halfway": "watchdog",
    "is far too slow": "backlog",
    "shows an error": "firmware",
    "gets very hot": "sensor",
}
REPORTS = ("The {device} {fault}.", "Our {device} {fault} since Monday.", "Please help, the {device} {fault} again.")
TICKET = "{animal}: inspect the {part}"
HELD_OUT = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs.

    Attributes:
      tickets: all tickets.
      train: the numbers of the tickets to train on.
      held_out: the numbers of the others.
      reports: for each ticket, what people may have reported.

    Example:
      >>> pairs = make_pairs(seed=0)
      >>> len(pairs.tickets), len(pairs.train), len(pairs.held_out)
      (64, 54, 10)
      >>> pairs.tickets[1], pairs.reports[1][0]
      ('heron: inspect the gasket', 'The coffee machine leaks water.')
    """

    tickets: tuple[str, ...]
    reports: tuple[tuple[str, ...], ...]
    train: np.ndarray
    held_out: np.ndarray

    def batch(self, step: int, size: int) -> tuple[list[str], list[str]]:
        """Returns the pairs of a training step, each with another ticket; the same for the same number of the step."""
        random = np.random.default_rng(step)
        numbers = random.choice(self.train, size, replace=False)
        reports = [self.reports[number][random.integers(len(REPORTS))] for number in numbers]
        return reports, [self.tickets[number] for number in numbers]


def make_pairs(seed: int) -> Pairs:
    """Makes the pairs; the seed decides which are held out."""
    tickets, reports = [], []
    for device, animal in DEVICES.items():
        for fault, part in FAULTS.items():
            tickets.append(TICKET.format(animal=animal, part=part))
            reports.append(tuple(report.format(device=device, fault=fault) for report in REPORTS))
    numbers = np.random.default_rng(seed).permutation(len(tickets))
    return Pairs(tuple(tickets), tuple(reports), numbers[HELD_OUT:], numbers[:HELD_OUT])
