"""The demo, run small: what it promises on the command line is asserted here on its result."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

import statewise as sw
from statewise.examples import demo, interrupted
from statewise.examples.char_model import ActivationNorm, CharTransformer
from statewise.examples.text import CharText, load_topics
from statewise.examples.training import advance

SMALL = demo.Settings(steps=150, batch=16, window=32, width=32, depth=1, heads=2, length=40)


def small_model(depth: int = 1) -> CharTransformer:
    return CharTransformer(7, context=12, width=8, depth=depth, heads=2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def ran() -> tuple[demo.DemoResult, str, int]:
    """The small demo's result, what it printed for people, and its exit status; run once, as `--json` runs it.

    In a process of its own, as people run it: what other tests have left in this one is no part of the promise that a
    resumed run gives the very same numbers.
    """
    code = "import json, sys; from statewise.examples import demo; given = json.loads(sys.argv[1])"
    code += "; raise SystemExit(demo.main(demo.Settings(**given), as_json=True))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(SMALL))],
        env=os.environ | {"PYTHONPATH": str(Path(sw.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return demo.DemoResult(**json.loads(done.stdout)), done.stderr, done.returncode


def test_the_demo_runs_to_its_end(ran: tuple[demo.DemoResult, str, int]) -> None:
    result, printed, status = ran
    assert status == 0
    assert len(result.train_losses) == SMALL.steps
    assert f"model.steps is {SMALL.steps}" in printed
    (layer,) = result.worst_layers  # of step 100
    assert layer.startswith("params/")
    assert f"{layer} moves most" in " ".join(printed.split())
    for kind in (*demo.KINDS, "UndeclaredWriteError", "unigram entropy", "held-out loss"):
        assert kind in printed


def test_it_learns_more_than_how_often_each_character_occurs(ran: tuple[demo.DemoResult, str, int]) -> None:
    result, _, _ = ran
    assert result.unigram_entropy == load_topics().unigram_entropy()
    assert result.held_out_loss < 0.9 * result.unigram_entropy < result.train_losses[0]


def test_the_careless_evaluation_is_refused_with_every_leaf_and_the_hint(
    ran: tuple[demo.DemoResult, str, int],
) -> None:
    result, _, _ = ran
    for word in ("norm/mean", "norm/var", "BatchStat", "dropout/rngs/count", "model.eval()"):
        assert word in result.refused


def test_generation_repeats_after_a_restart_and_only_then(ran: tuple[demo.DemoResult, str, int]) -> None:
    result, _, _ = ran
    assert result.generated == result.repeated != result.unrestarted
    assert result.generated.startswith(SMALL.prompt)
    assert result.unrestarted.startswith(SMALL.prompt)
    assert len(result.generated) == SMALL.length
    assert result.decode_steps == SMALL.length - 1


def test_a_killed_training_goes_on_with_the_very_same_losses(ran: tuple[demo.DemoResult, str, int]) -> None:
    result, printed, _ = ran
    assert result.killed_at >= 10
    assert result.killed_at % 5 == 0
    assert result.resumed_losses == result.train_losses[result.killed_at : result.killed_at + 5]
    assert f"killed after step {result.killed_at} was saved" in printed


def test_a_training_that_ends_by_itself_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupted.dataclasses, "asdict", lambda settings: {"no such setting": 1})
    with pytest.raises(AssertionError, match="exited by itself"):
        interrupted.killed_and_resumed(SMALL, load_topics())


def test_a_log_holds_lines_and_no_control_characters(ran: tuple[demo.DemoResult, str, int]) -> None:
    _, printed, _ = ran
    assert not set(printed) & set("\r\x1b\x08")
    assert printed.count(f"{SMALL.steps}/{SMALL.steps}") == 1
    assert "step 100" in printed


def test_a_promise_that_does_not_hold_is_an_error() -> None:
    printed = io.StringIO()
    with pytest.raises(AssertionError, match="does not hold: the sky is green"):
        demo._check(Console(file=printed), False, "the sky is green")
    assert not printed.getvalue()


def test_one_decode_step_for_each_character_read() -> None:
    text = CharText.cut("abcdefg" * 3, held_out=0.5)
    model = small_model(depth=2)
    plan = demo.KINDS.plan(model)
    state, written, logits = demo.write(plan.take(model), text, "abc", length=10)
    plan.put(state, model)
    assert int(model.position[...]) == 9 == len(logits)
    assert len(written) == 10
    # Reading the whole text at once scores every character as reading it one by one does.
    model.eval()
    at_once = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(text.encode(written))[None, :-1])
    np.testing.assert_allclose(logits, at_once[0], atol=1e-5)


def test_training_gives_the_numbers_of_nnx_jit_and_nnx_optimizer() -> None:
    """Microbatches by hand: gradients of each part, one after the other, and one update by their mean."""
    rival, model, text = small_model(), small_model(), CharText.cut("abcdefg" * 30, held_out=0.5)
    optimizer = nnx.Optimizer(rival, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model: CharTransformer, optimizer: nnx.Optimizer, x: np.ndarray, y: np.ndarray) -> object:
        model.steps[...] += 1
        parts = []
        for rows in (slice(0, 2), slice(2, 4)):
            loss_of = lambda model, rows=rows: demo.cross_entropy(model(x[rows]), y[rows])  # noqa: E731
            parts.append(nnx.value_and_grad(loss_of)(model))
        loss, grads = jax.tree.map(lambda *of_parts: sum(of_parts) / 2, *parts)
        optimizer.update(model, grads)
        return loss

    plan = demo.KINDS.plan(model, optimizers={"params": optax.sgd(0.1, momentum=0.9)})
    state, random = plan.take(model), np.random.default_rng(0)
    for number in range(98, 102):
        x, y = text.batch(random, 4, 12)
        expected = step(rival, optimizer, x, y)
        state, loss, measured = advance(state, number, x, y)
        assert (measured is not None) == (number == 100)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    plan.put(state, model)
    ours, theirs = (nnx.to_flat_state(nnx.state(m, nnx.Not(nnx.RngState))) for m in (model, rival))
    for (path, leaf), (_, other) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(leaf[...], other[...], rtol=1e-4, atol=1e-5, err_msg=str(path))
    assert int(model.steps[...]) == 4
    assert int(model.blocks[0].dropout.rngs.count[...]) == int(rival.blocks[0].dropout.rngs.count[...]) > 0


def test_the_declaration_claims_every_leaf_once() -> None:
    model = small_model(depth=2)
    plan = demo.KINDS.plan(model)
    assert {kind: len(plan[kind]) for kind in demo.KINDS} == {
        "params": sw.count(model, nnx.Param),
        "stats": 2,
        "counter": 1,
        "cache": 2 * 3 + 1,  # key, value and index of each block, and the model's own position
        "rng": 2 * 2,
    }


def test_statistics_move_in_training_and_are_only_read_in_evaluation() -> None:
    norm, x = ActivationNorm(3, momentum=0.5), np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    norm(jnp.asarray(x))
    np.testing.assert_allclose(norm.mean[...], 0.5 * x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(norm.var[...], 0.5 + 0.5 * x.var((0, 1)), rtol=1e-6)
    norm.eval()
    mean, var = np.asarray(norm.mean[...]), np.asarray(norm.var[...])
    y = norm(jnp.asarray(x + 100))
    np.testing.assert_array_equal(norm.mean[...], mean)
    np.testing.assert_array_equal(norm.var[...], var)
    np.testing.assert_allclose(y, (x + 100 - mean) / np.sqrt(var + 1e-5), rtol=1e-5)


def test_the_text_is_real_cut_once_and_never_seen_twice() -> None:
    text = load_topics(held_out=0.1)
    train, held_out = text.decode(text.train), text.decode(text.held_out)
    assert len(train) + len(held_out) > 200_000
    assert abs(len(held_out) / (len(train) + len(held_out)) - 0.1) < 1e-4
    assert not set(train.split("\n\n")[:-1]) & set(held_out.split("\n\n")[1:])
    assert text.encode(held_out[:500]) == text.held_out[:500].tolist()
    with pytest.raises(ValueError):
        text.encode("\0")


def test_batches_are_windows_and_the_characters_after_them() -> None:
    text = CharText.cut("0123456789" * 20, held_out=0.5)
    x, y = text.batch(np.random.default_rng(0), 4, 8)
    assert x.shape == y.shape == (4, 8)
    np.testing.assert_array_equal((x + 1) % 10, y)
    batches = text.held_out_batches(3, 8)
    assert len(batches) == 99 // 24
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]).ravel(), text.held_out[: 24 * len(batches)])
    for x, y in batches:
        np.testing.assert_array_equal((x + 1) % 10, y)


def test_unigram_entropy_is_the_entropy_of_the_counts() -> None:
    text = load_topics()
    counts = collections.Counter(text.decode(text.held_out))
    total = sum(counts.values())
    expected = -math.fsum(n / total * math.log(n / total) for n in counts.values())
    assert text.unigram_entropy() == pytest.approx(expected)
