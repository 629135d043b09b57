"""The demo on real weights, run small: what it promises on the command line is asserted here on its result."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import statewise as sw
from statewise.examples import minilm

SMALL = minilm.Settings(steps=10, batch=8, length=16)


@pytest.fixture(scope="module")
def ran() -> tuple[minilm.MiniLMResult, str]:
    """The small demo's result, and what it printed for people; in a process of its own, as people run it."""
    code = "import json, sys; from statewise.examples import minilm; given = json.loads(sys.argv[1])"
    code += "; raise SystemExit(minilm.main(minilm.Settings(**given), as_json=True))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(dataclasses.asdict(SMALL))],
        env=os.environ | {"PYTHONPATH": str(Path(sw.__file__).parents[1]), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return minilm.MiniLMResult(**json.loads(done.stdout)), done.stderr


def test_the_published_vectors(ran: tuple[minilm.MiniLMResult, str]) -> None:
    result, printed = ran
    assert result.dropped == ["embeddings.position_ids"]
    assert 0 < result.published_difference < 1e-5
    assert "10 sentences are the vectors of sentence-transformers" in printed
    for kind in ("base", "params", "corpus"):
        assert kind in printed


def test_training_brings_reports_to_their_tickets(ran: tuple[minilm.MiniLMResult, str]) -> None:
    result, printed = ran
    assert len(result.losses) == SMALL.steps
    assert result.losses[-1] < result.losses[0]
    (before, after), (found_before, found_after) = result.similarity, result.found
    assert before < 0.2 < 0.4 < after
    assert found_before < found_after <= 10
    for found, similarity in zip(result.found, result.similarity, strict=True):
        assert f"{found} of 10 find their own ticket, at a mean similarity of {similarity:.2f}" in printed


def test_vectors_of_the_old_weights_are_refused(ran: tuple[minilm.MiniLMResult, str]) -> None:
    result, printed = ran
    assert "search reads corpus, which is stale: base and params have changed since" in result.stale
    assert "StaleError" in printed


def test_it_resumes_to_the_bit(ran: tuple[minilm.MiniLMResult, str]) -> None:
    result, _ = ran
    assert result.resumed_from == SMALL.steps - 5
    assert result.resumed_losses == result.losses[result.resumed_from :]


def test_transformers_has_the_trained_vectors(ran: tuple[minilm.MiniLMResult, str]) -> None:
    result, printed = ran
    assert 0 < result.exported_difference < 1e-5
    assert "transformers loads it, and has the same vectors" in printed
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert file in printed
