"""A complete job on one page: declare, inspect, train, evaluate, generate, and resume after a kill.

`make demo` (or `python -m statewise demo`) trains the small character transformer of `char_model.py` on the text of
`text.py`, on the CPU and in about a minute.  The model is plain NNX and carries five kinds of state; they are
declared once, in `KINDS` of `training.py`, and everything below reads that one declaration.  Each promise is checked
immediately: if one does not hold, the demo stops with an error.

What to copy: `training.py`, which trains in microbatches and measures every hundredth step; the three steps here, the
lines of `run` and `_fit`, and `write`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import statewise as sw
from statewise.examples.char_model import CharTransformer
from statewise.examples.interrupted import killed_and_resumed
from statewise.examples.text import CharText, load_topics
from statewise.examples.training import KINDS, Settings, advance, begin, cross_entropy, train
from statewise.results import Measured

__all__ = [
    "KINDS",
    "DemoResult",
    "Settings",
    "begin",
    "careless",
    "cross_entropy",
    "decode",
    "evaluate",
    "main",
    "run",
    "train",
    "worst_layer",
    "write",
]


@sw.step
def evaluate(model: CharTransformer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes the loss on a batch.  Declares no writes, so it cannot change anything."""
    model.eval()  # the module is rebuilt in every trace, so the next training step is not affected
    return cross_entropy(model(x), y)


@sw.step
def careless(model: CharTransformer, x: jax.Array, y: jax.Array) -> jax.Array:
    """Evaluates without `model.eval()`, by mistake.  Plain NNX would run it, and shift the statistics."""
    return cross_entropy(model(x), y)


@sw.step(writes="cache")
def decode(model: CharTransformer, token: jax.Array) -> jax.Array:
    """Reads one more character; returns logits of shape (alphabet,) for the next.  Only writes the cache."""
    model.eval()
    return model(token[None, None], decode=True)[0, 0]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The results of the demo; losses and entropy in nats per character.

    Attributes:
      train_losses: the loss of every training step.
      worst_layers: the layer that moved most, relative to its norm, in every hundredth step.
      held_out_loss: the loss on the held-out text after training.
      unigram_entropy: the loss on the same text of the best guess that ignores the context.
      refused: the text of the `UndeclaredWriteError` that the careless evaluation raised.
      generated, repeated: two texts, each from a restarted cache.
      unrestarted: another text, from the cache as the second left it.
      decode_steps: the number of decode steps of each.
      killed_at: the newest complete checkpoint of a training process that was killed.
      resumed_losses: the losses of the steps after it, resumed from that checkpoint.
      seconds: the duration of the demo.
    """

    train_losses: list[float]
    worst_layers: list[str]
    held_out_loss: float
    unigram_entropy: float
    refused: str
    generated: str
    repeated: str
    unrestarted: str
    decode_steps: int
    killed_at: int
    resumed_losses: list[float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as plain data."""
        return dataclasses.asdict(self)


def write(
    state: sw.State, text: CharText, prompt: str, length: int, seed: int = 0, temperature: float = 0.6
) -> tuple[sw.State, str, np.ndarray]:
    """Continues a prompt, with one decode step for each character that is read.

    Args:
      state: reading continues from the cache in it; call `state.restart("cache")` first for a fresh start.
      text: the text, for its alphabet.
      prompt: the first characters.
      length: the total number of characters, including the prompt.
      seed: the seed of the sampling.
      temperature: the temperature of the sampling.

    Returns:
      the state with its cache written, the text, and the logits of each step, of shape (length - 1, alphabet).
    """
    numbers, scores = text.encode(prompt), []
    for place in range(length - 1):
        state, logits = decode(state, jnp.asarray(numbers[place]))
        scores.append(np.asarray(logits))
        if place + 1 == len(numbers):
            key = jax.random.fold_in(jax.random.key(seed), place)
            numbers.append(int(jax.random.categorical(key, logits / temperature)))
    return state, text.decode(numbers), np.stack(scores)


def run(settings: Settings | None = None, console: Console | None = None) -> DemoResult:
    """Runs the demo.

    Args:
      settings: its sizes.
      console: where it prints; standard output by default.

    Returns:
      the results.

    Raises:
      AssertionError: a promise does not hold.
    """
    settings, console, start = settings or Settings(), console or Console(), time.perf_counter()
    text = load_topics()
    model, plan = begin(settings, text)

    _title(console, "1  What the model carries")
    console.print(sw.census(model, KINDS))

    # The plan takes the model's arrays.
    _title(console, "2  Training")
    state = plan.take(model)
    state, losses, worst = _fit(state, text, settings, console)
    held_out, entropy = _held_out_loss(state, text, settings), text.unigram_entropy()
    console.print(f"held-out loss    {held_out:.3f} nats per character")
    console.print(f"unigram entropy  {entropy:.3f} nats per character, of the same text")
    _check(console, held_out < 0.9 * entropy, "it predicts better than any guess that ignores the context")

    _title(console, "3  An evaluation that forgot model.eval()")
    refused = _refusal(state, text, settings)
    console.print(Text(f"{type(refused).__name__}: {refused}", style="red"), soft_wrap=True)
    unchanged = _held_out_loss(state, text, settings) == held_out
    _check(console, unchanged, "rejected before anything ran: the state still evaluates to the same loss")

    state, texts = _generation(state, text, settings, console)
    resumed = _interruption(losses, text, settings, console)

    plan.put(state, model)  # back into the original NNX object
    _title(console, "Summary")
    _check(console, int(model.steps[...]) == settings.steps, f"model.steps is {settings.steps}: each step counted once")
    seconds = time.perf_counter() - start
    console.print(f"Declared once; trained, evaluated and generated by that declaration, in {seconds:.0f} s.")
    return DemoResult(losses, worst, held_out, entropy, str(refused), *texts, settings.length - 1, *resumed, seconds)


def worst_layer(measured: Measured) -> tuple[str, float]:
    """Returns the layer that an update moved most, and by which share of its parameters' norm."""
    figures = measured.to_dict(depth=2)
    norms = {key.removeprefix("param_norm/"): norm for key, norm in figures.items() if key.startswith("param_norm/")}
    moved = {layer: figures[f"update_norm/{layer}"] / norm for layer, norm in norms.items() if norm}
    return max(moved.items(), key=lambda item: item[1])


def _fit(
    state: sw.State, text: CharText, settings: Settings, console: Console
) -> tuple[sw.State, list[float], list[str]]:
    """Trains, with a progress bar in a terminal, and a line every 100 steps for a log."""
    random, losses, worst = np.random.default_rng(settings.seed), [], []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("training", total=settings.steps, loss=float("nan"))
        for step in range(1, settings.steps + 1):
            batch = text.batch(random, settings.batch, settings.window)
            state, loss, measured = advance(state, step, *batch)
            losses.append(loss)
            progress.update(task, advance=1, loss=loss)
            if measured is not None:
                layer, moved = worst_layer(measured)
                worst.append(layer)
                console.print(f"step {step:3d}         loss {np.mean(losses[-100:]):.3f}, mean of the last 100")
                console.print(f"                 {layer} moves most: {moved:.2%} of its norm")
    return state, losses, worst


def _held_out_loss(state: sw.State, text: CharText, settings: Settings) -> float:
    """Returns the mean loss over all of the held-out text."""
    batches = text.held_out_batches(size=64, window=settings.window)
    return float(np.mean([evaluate(state, x, y) for x, y in batches]))


def _refusal(state: sw.State, text: CharText, settings: Settings) -> sw.UndeclaredWriteError:
    """Returns the error that the careless evaluation raises."""
    try:
        careless(state, *text.held_out_batches(size=64, window=settings.window)[0])
    except sw.UndeclaredWriteError as error:
        return error
    raise AssertionError("an evaluation that writes statistics was not rejected")


def _generation(
    state: sw.State, text: CharText, settings: Settings, console: Console
) -> tuple[sw.State, tuple[str, str, str]]:
    """Writes from the same prompt three times: twice from a restarted cache, then from a used one."""
    _title(console, "4  Generation")
    prompt, length = settings.prompt, settings.length
    state, first, first_logits = write(state.restart("cache"), text, prompt, length)
    state, second, second_logits = write(state.restart("cache"), text, prompt, length)
    state, third, third_logits = write(state, text, prompt, length)
    for title, text_shown in (("cache restarted", first), ("restarted again", second), ("not restarted", third)):
        console.print(Panel(Text(text_shown), title=title, title_align="left", border_style="blue"))
    same = first == second and np.array_equal(first_logits, second_logits)
    _check(console, same, "after a restart: the same text, and bitwise equal logits")
    apart = first != third and not np.allclose(first_logits[0], third_logits[0])
    _check(console, apart, "without it: another text, with different logits from the first character on")
    _check(console, len(first_logits) == length - 1, f"{length - 1} decode steps for {length} characters")
    return state, (first, second, third)


def _interruption(losses: list[float], text: CharText, settings: Settings, console: Console) -> tuple[int, list[float]]:
    """Trains once more in a separate process, kills it, resumes, and compares with the uninterrupted run."""
    _title(console, "5  Killed, and resumed")
    resumed = killed_and_resumed(settings, text)
    expected = losses[resumed.step : resumed.step + len(resumed.losses)]
    for step, (full, again) in enumerate(zip(expected, resumed.losses, strict=True), resumed.step + 1):
        console.print(f"step {step:3d}         loss {full:.9f} uninterrupted, {again:.9f} resumed")
    _check(
        console,
        resumed.losses == expected,
        f"killed after step {resumed.step} was saved: the following losses are bitwise equal",
    )
    return resumed.step, resumed.losses


def _title(console: Console, title: str) -> None:
    console.print()
    console.rule(Text(title, style="bold"), align="left")


def _check(console: Console, holds: bool, fact: str) -> None:
    """Prints a fact; raises if it does not hold."""
    if not holds:
        raise AssertionError(f"does not hold: {fact}")
    console.print(f"[green]ok[/green]  {fact}")


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
