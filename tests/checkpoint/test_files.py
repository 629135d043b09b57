"""Which bytes of a checkpoint's files have a SHA-256: all but the arrays' own, which have sums."""

from __future__ import annotations

import hashlib
import json
import pwd
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from checkpoint_models import spread, taken
from statewise._src.checkpoint.format import files
from statewise._src.checkpoint.orbax import write as writing


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a kilobyte is large."""
    monkeypatch.setattr(files, "SMALL_FILE", 1024)


def facts_of(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "statewise.json").read_text())["content"]["files"]


def outside(facts: dict[str, Any], start: int, length: int) -> bool:
    """Whether none of the parts has a byte of this."""
    return all(
        start + length <= begin or begin + size <= start for begin, size in facts.get("parts", [[0, facts["bytes"]]])
    )


@pytest.mark.parametrize("layout", ["named", "packed"])
@pytest.mark.parametrize("apart", [False, True])
def test_an_array_s_bytes_are_left_to_its_sums_and_all_others_are_hashed(
    tmp_path: Path, layout: str, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if apart:  # each array is committed by itself, so that the index stands between arrays
        monkeypatch.setattr(writing, "_AT_ONCE", 0)
    dice = np.random.default_rng(0)
    values = {f"a{number}": jnp.asarray(dice.standard_normal(900 + number), jnp.float32) for number in range(4)}
    sw.save(tmp_path / "saved", taken(values), layout=layout)
    facts = facts_of(tmp_path / "saved")
    for value in values.values():
        inside = []
        for name, fact in facts.items():
            at = (tmp_path / "saved" / name).read_bytes().find(np.asarray(value).tobytes())
            inside += [outside(fact, at, value.nbytes)] if at >= 0 else []
        assert inside == [True]
    large = {name: fact for name, fact in facts.items() if "parts" in fact}
    arrays = sum(value.nbytes for value in values.values())
    assert sum(fact["bytes"] - sum(length for _, length in fact["parts"]) for fact in large.values()) == arrays
    for name, fact in facts.items():
        data = (tmp_path / "saved" / name).read_bytes()
        parts = b"".join(data[start : start + length] for start, length in fact.get("parts", [[0, len(data)]]))
        assert fact["sha256"] == hashlib.sha256(parts).hexdigest()


def test_the_pieces_of_an_array_on_a_mesh_are_left_to_its_sums(tmp_path: Path, devices: list[jax.Device]) -> None:
    state = spread(taken({"a": jnp.arange(16.0 * 1000).reshape(16, 1000)}), devices)
    sw.save(tmp_path / "saved", state)
    hashed = sum(length for fact in facts_of(tmp_path / "saved").values() for _, length in fact.get("parts", []))
    total = sum(fact["bytes"] for fact in facts_of(tmp_path / "saved").values() if "parts" in fact)
    assert total - hashed == 16 * 1000 * 4


def test_a_large_index_of_orbax_is_hashed_whole(tmp_path: Path) -> None:
    sw.save(tmp_path / "saved", taken({f"a{number}": jnp.ones(3) for number in range(30)}))
    fact = facts_of(tmp_path / "saved")["_METADATA"]
    assert fact["bytes"] > files.SMALL_FILE
    assert fact["sha256"] == hashlib.sha256((tmp_path / "saved/_METADATA").read_bytes()).hexdigest()


def test_what_is_too_large_to_be_hashed_has_its_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HASHED", 100)
    (tmp_path / "large").write_bytes(bytes(101))
    (tmp_path / "small").write_bytes(bytes(100))
    (tmp_path / "empty").write_bytes(b"")
    found = files.files_of(epath.Path(tmp_path))
    assert found["large"] == {"bytes": 101}
    assert found["small"] == {"bytes": 100, "sha256": hashlib.sha256(bytes(100)).hexdigest()}
    assert found["empty"] == {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


@given(
    data=st.binary(max_size=5000),
    parts=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 3000)), max_size=5),
)
def test_the_sha_of_parts_is_that_of_the_parts_one_after_the_other(
    data: bytes, parts: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = epath.Path(tmp_path_factory.mktemp("parts")) / "file"
    path.write_bytes(data)
    expected = b"".join(data[start : start + length] for start, length in parts)
    assert files.sha256_of(path, parts) == hashlib.sha256(expected).hexdigest()
    assert files.sha256_of(path) == hashlib.sha256(data).hexdigest()


def test_a_user_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the user's number need not be in the list of users, and `pwd` raises KeyError."""

    def unknown(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "a", state)
    restored, _ = sw.restore(tmp_path / "a", state.plan.abstract())
    assert not sw.diff(restored, state)
