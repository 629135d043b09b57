"""Names that become folders, keys and fields: of extra items, of leaves, and of paths as TensorStore gets them."""

from __future__ import annotations

import os
import pathlib

import jax.numpy as jnp
import pytest
import tensorstore as ts
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statewise as sw
from odd_paths import (
    BYTES,
    LOCK,
    STATE,
    assert_works,
    is_name,
    segments,
)
from refusals import refused
from statewise._src.checkpoint.orbax.epath import epath
from statewise._src.checkpoint.orbax.paths import short_name, spec_of
from strategies import Node

# --- names that become folders and keys --------------------------------------------------------------------------

taken = st.sampled_from(["statewise.json", "_CHECKPOINT_METADATA", "default", "self", "commit_success.txt", "state"])


@settings(max_examples=15)
@given(name=st.one_of(taken, segments, st.text(max_size=230)))
@example(name="~")
@example(name="a*")
@example(name="_METADATA")
@example(name="\ud800")
@example(name="x" * 200)
def test_an_extra_item_of_any_name_comes_back_or_is_refused_before_the_step_begins(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    extra = {"loss": 0.5}
    if name in ("force", "only", "base", "layout", "cast"):
        return
    with sw.Checkpoints(tmp_path_factory.mktemp("run")) as checkpoints:
        try:
            checkpoints.save(1, STATE, **{name: extra})
        except sw.SaveError:
            assert not os.listdir(checkpoints.directory)
            return
        checkpoints.wait()
        restored = checkpoints.restore(STATE.plan.abstract(), extra=name)
        assert restored.extra == {name: extra}
        assert_works(checkpoints.directory / "1")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("statewise.json", "that name is taken by Orbax or Statewise"),
        ("default", "that name is taken by Orbax or Statewise"),
        ("a.__lock", LOCK),
        ("\udcff", BYTES),
        ("x" * 201, "it has 201 bytes, and the limit is 200"),
    ],
    ids=ascii,
)
def test_an_extra_item_s_name_that_no_folder_can_have(tmp_path: pathlib.Path, name: str, why: str) -> None:
    with (
        sw.Checkpoints(tmp_path) as checkpoints,
        refused(sw.SaveError, f"An extra item cannot be called {name!r}: {why}.", hint="another name"),
    ):
        checkpoints.save(1, STATE, **{name: 1})


def test_an_extra_item_called_like_an_option_of_save_is_not_lost(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        message = "force={'loss': 1} is neither True nor False."
        with refused(sw.SaveError, message, hint="another name, for an extra item"):
            checkpoints.save(1, STATE, **{"force": {"loss": 1}})
        assert not os.listdir(tmp_path)


def test_an_extra_item_is_asked_for_by_its_name_and_not_by_a_path(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, metrics={"loss": step})
        checkpoints.wait()
        for name in ("../1/metrics", "metrics/", ".", ""):
            with refused(sw.RestoreError, f"Step 2 has no item {name!r}.", hint="one of: metrics, state"):
                checkpoints.restore(STATE, extra=name)


@settings(max_examples=20)
@given(keys=st.lists(st.one_of(segments, st.text(max_size=20)), min_size=1, max_size=3, unique=True))
@example(keys=["a.b", "a/b"])
@example(keys=["\u00e9", "e\u0301"])
@example(keys=[".", ".."])
def test_leaves_of_any_name_come_back(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("keys")
    held = {key: nnx.Param(jnp.full(2, float(at))) for at, key in enumerate(keys)}
    model = Node(held=nnx.data(held))
    plan = sw.plan(model)
    sw.save(root / "run", plan.take(model))
    restored, report = sw.restore(root / "run", plan.abstract())
    assert report.ok
    assert {key: float(restored["params"]["held"][key][0]) for key in keys} == {key: at for at, key in enumerate(keys)}


@pytest.mark.parametrize("to", ["safetensors", "linen"])
def test_a_leaf_whose_name_another_format_cannot_hold(tmp_path: pathlib.Path, to: str) -> None:
    model = Node(held=nnx.data({"\udcff": nnx.Param(jnp.ones(2))}))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "run", state)
    place = tmp_path / "made.safetensors"
    with refused(
        sw.RestoreError,
        f"{tmp_path / 'run'} does not become {place} ({to}): 1 leaf is in the way. Nothing was read or written.",
        leaves=["held/\udcff: Param(2,) float32  kind=params  (has a name that is not UTF-8)"],
        hint="give it another name: rename={'name in the source': 'another/path'}",
    ):
        sw.convert(tmp_path / "run", place, to=to)
    sw.convert(tmp_path / "run", place, to=to, rename={"held/\udcff": "held/a"})
    assert sw.inspect(place).total.size == 2


# --- as TensorStore gets them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("/a#b/c%20?d", {"driver": "file", "path": "/a#b/c%20?d/"}),
        ("gs://my-bucket/a#b/c%20?d", {"driver": "gcs", "bucket": "my-bucket", "path": "a#b/c%20?d/"}),
        ("gs://my-bucket", {"driver": "gcs", "bucket": "my-bucket", "path": ""}),
        (
            "s3://my-bucket/run/3",
            {"driver": "s3", "bucket": "my-bucket", "path": "run/3/", "use_conditional_write": True},
        ),
    ],
)
def test_a_path_is_a_field_and_no_part_of_a_url(path: str, spec: dict[str, str]) -> None:
    made = spec_of(epath(path))
    assert made == spec
    # TensorStore's own reading of it: the fields come back, and its URL has them escaped.
    store = ts.KvStore.Spec(made)
    assert {name: store.to_json().get(name, "") for name in spec} == spec
    assert "#" not in store.url
    assert "?" not in store.url


@given(name=segments.filter(is_name))
def test_a_long_name_is_cut_and_tells_apart(name: str) -> None:
    assert len(os.fsencode(short_name(name))) <= 60
    longer = f"{name}{'x' * 60}"
    assert short_name(longer) != short_name(f"{longer}y")
