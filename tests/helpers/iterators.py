"""Data iterators to stop and to resume: Grain's, and those that people write themselves."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

SIZE = 40
# Grain asks for a flag where its workers start, and only absl's own `app.run` reads the command line.
flags.FLAGS.mark_as_parsed()
# In the thread that asks, so that a test leaves no threads behind.
HERE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Counting:
    """One that somebody wrote: an epoch and a position in a shuffled order."""

    def __init__(self) -> None:
        self.position = {"epoch": 0, "next": 0}

    def __iter__(self) -> Counting:
        return self

    def __next__(self) -> int:
        order = np.random.default_rng(self.position["epoch"]).permutation(SIZE)
        found = int(order[self.position["next"]])
        self.position["next"] += 1
        if self.position["next"] == SIZE:
            self.position.update(epoch=self.position["epoch"] + 1, next=0)
        return found

    def get_state(self) -> Any:
        return self.position  # not a copy

    def set_state(self, state: Any) -> None:
        self.position = {"epoch": state["epoch"], "next": state["next"]}


class Pickling(Counting):
    """The same, with bytes that are not JSON as its position."""

    def get_state(self) -> Any:
        return b"\xff" + pickle.dumps(self.position)

    def set_state(self, state: Any) -> None:
        self.position = pickle.loads(state[1:])


class Holding:
    """One with any position."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def get_state(self) -> Any:
        return self.state

    def set_state(self, state: Any) -> None:
        self.state = state


def numbers() -> grain.MapDataset:
    return grain.MapDataset.range(SIZE).shuffle(seed=3)


def loader(worker_count: int = 0) -> grain.DataLoader:
    sampler = grain.samplers.IndexSampler(
        num_records=SIZE, shard_options=grain.sharding.NoSharding(), shuffle=True, num_epochs=2, seed=3
    )
    return grain.DataLoader(
        data_source=grain.sources.RangeDataSource(0, SIZE, 1),
        sampler=sampler,
        operations=[grain.transforms.Batch(4)],
        worker_count=worker_count,
        read_options=HERE,
    )


def elastic() -> grain.experimental.ElasticIterator:
    return grain.experimental.ElasticIterator(numbers(), 4, grain.sharding.NoSharding(), read_options=HERE)


def random_map(value: int, rng: np.random.Generator) -> float:
    return value + rng.random()


def shuffled_in_windows() -> grain.IterDataset:
    flat = grain.MapDataset.range(SIZE).to_iter_dataset(HERE)
    return grain.experimental.WindowShuffleIterDataset(flat, window_size=7, seed=5).batch(3)


PIPELINES: dict[str, Callable[[], Any]] = {
    "map": lambda: iter(numbers().repeat(2).batch(4).to_iter_dataset(HERE)),
    "in threads": lambda: iter(numbers().random_map(random_map, seed=1).batch(4).to_iter_dataset()),
    "filter": lambda: iter(numbers().to_iter_dataset(HERE).filter(lambda x: x % 3).batch(4, drop_remainder=True)),
    "repeat": lambda: iter(grain.experimental.RepeatIterDataset(numbers().to_iter_dataset(HERE).batch(8), 3)),
    "windows": lambda: iter(shuffled_in_windows()),
    "mix": lambda: iter(grain.MapDataset.mix([numbers(), numbers().map(lambda x: -x)], [2, 1]).to_iter_dataset(HERE)),
    "loader": lambda: iter(loader()),
    "elastic": lambda: iter(elastic()),
    "own": Counting,
    "own bytes": Pickling,
}


def drawn(iterator: Iterator[Any], count: int) -> list[Any]:
    """So many batches, as lists, or all that are left; what `next` says at the end is one more."""
    found: list[Any] = []
    for _ in range(count):
        try:
            found.append(np.asarray(next(iterator)).tolist())
        except StopIteration:
            return [*found, "end"]
    return found
