"""The parts of the demo on real weights that need neither torch nor these weights, on a folder written by hand."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import statewise as sw
from family_folders import BERT_CONFIG, bert_shapes, written
from statewise.examples import minilm_encoder as encoder
from statewise.examples.minilm_pairs import DEVICES, FAULTS, make_pairs

RANDOM = np.random.default_rng(0)
TOKENS = jnp.asarray(RANDOM.integers(0, 11, (3, 5)))
MASK = jnp.asarray((np.arange(5)[None] < np.array([[5], [2], [4]])).astype(int))


def test_tickets_that_are_held_out_are_made_of_words_that_are_trained_on() -> None:
    pairs = make_pairs(seed=0)
    assert sorted([*pairs.train, *pairs.held_out]) == list(range(len(DEVICES) * len(FAULTS)))
    assert len({*pairs.tickets}) == len(pairs.tickets)
    trained = {word for number in pairs.train for word in pairs.tickets[number].split()}
    assert all({*pairs.tickets[number].split()} <= trained for number in pairs.held_out)
    held_out = {pairs.tickets[number] for number in pairs.held_out}
    for step in range(20):
        reports, tickets = pairs.batch(step, 16)
        assert len({*tickets}) == 16
        assert not held_out & {*tickets}
        assert all(
            report in pairs.reports[pairs.tickets.index(ticket)]
            for report, ticket in zip(reports, tickets, strict=True)
        )
        assert (reports, tickets) == pairs.batch(step, 16)


def test_an_encoder_is_read_searched_trained_and_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    arrays = written(folder, BERT_CONFIG | {"num_hidden_layers": 4}, bert_shapes("", True, layers=4))
    names, plan = encoder.begin(folder, 3, encoder.KINDS)
    assert {leaf.path[2] for leaf in plan["params"] if leaf.path[1] == "layers"} == {3}
    searcher, _ = sw.restore(folder, plan.abstract(), names=names)

    # Vectors have length 1, and do not depend on padding.
    vectors = np.asarray(encoder.embed(searcher, TOKENS, MASK))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(encoder.embed(searcher, TOKENS * MASK, MASK), vectors)
    searcher, _ = encoder.index(searcher, TOKENS, MASK)
    np.testing.assert_allclose(encoder.search(searcher, TOKENS, MASK), vectors @ vectors.T, rtol=0, atol=1e-6)

    _, plan = encoder.begin(folder, 3, encoder.TRAINING, {"params": optax.adam(1e-2)})
    learner, _ = sw.restore(folder, plan.abstract(), names=names)
    assert {name: kind.compute for name, kind in plan.kinds.items() if kind.compute} == {
        "base": "bfloat16",
        "params": "bfloat16",
    }
    # Four pairs: each part of a batch needs two, or there is nothing to tell apart.
    tokens = jnp.asarray(RANDOM.integers(0, 11, (4, 2, 5)))
    learner, _ = encoder.train(learner, tokens, jnp.ones_like(tokens))
    searcher = sw.transfer(learner, searcher, kinds=("base", "params"))
    with pytest.raises(sw.StaleError) as caught:
        encoder.search(searcher, TOKENS, MASK)
    assert caught.value.kind == "corpus"
    searcher, _ = encoder.index(searcher, TOKENS, MASK)
    assert np.abs(np.asarray(encoder.embed(searcher, TOKENS, MASK)) - vectors).max() > 1e-4

    sw.convert(learner, tmp_path / "back", names=names)
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(back) == sorted(arrays)
    for name, array in arrays.items():
        is_trained = "layer.3." in name or "pooler" in name
        if not is_trained:
            assert back[name].tobytes() == array.tobytes(), name
        elif "weight" in name and "pooler" not in name:
            assert not np.array_equal(back[name], array), name
