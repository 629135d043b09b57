"""Paths that some library takes for more than they are, and a state to keep there."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st

import statewise as sw
from strategies import Node

# What some library on the way takes for more than a letter of a name; all of these work.
NAMES = (
    *("run#3", "lr%3D0.1", "a%", "a?b", "a&b=c|d;e", "a b", " ", "'a'", '"', "a\nb", "a\tb", "\x01", "\x7f", "\u2028"),
    *("caf\u00e9", "cafe\u0301", "\u65e5\u672c", "\U0001f600", "-run", "--", "~", "a~", "$HOME", "${HOME}", "{a,b}"),
    *("[a]", "a[1", "[", "]", "[!a]", "*", "a*", "**", "?", "a:b", "a@b", "C:", "file:", ".hidden", "...", "a.", "..a"),
    *("x" * 255, "\u00e9" * 127, "a.safetensors", "ocdbt.process_0", "tmp", "a.orbax-checkpoint-tmp", "7", "a.__locks"),
)
# The same as paths of several of them.
PATHS = tuple("/".join(NAMES[at : at + 5]) for at in range(0, len(NAMES), 5))
# What TensorStore or Orbax cannot be given, why, and what is proposed instead.
BACKSLASH = "TensorStore takes a backslash for a slash"
LOCK = "TensorStore keeps names that end in .__lock for its own files"
BYTES = "it is not UTF-8, and TensorStore takes only text"
URL = "Orbax takes 'gs:/' for the beginning of a URL"
UNUSABLE = (
    ("a\\b", BACKSLASH, "a_b"),
    ("\\", BACKSLASH, "_"),
    ("run.__lock", LOCK, "run_lock"),
    ("\udcff", BYTES, "_"),
    ("gs:", URL, "gs_"),
    ("my_gs:", URL, "my_gs_"),
)


def state_of(**values: Any) -> sw.State:
    model = Node(**{name: nnx.Param(value) for name, value in values.items()})
    return sw.plan(model).take(model)


STATE = state_of(w=jnp.arange(6.0).reshape(2, 3), b=jnp.ones(3))


def assert_kept(state: sw.State) -> None:
    for name in ("w", "b"):
        assert np.array_equal(state["params"][name], STATE["params"][name])


def assert_works(path: Any) -> None:
    """All that reads a checkpoint of Statewise reads this one."""
    state, report = sw.restore(path, STATE.plan.abstract())
    assert report.ok
    assert_kept(state)
    assert sw.preview(path, STATE).ok
    assert sw.inspect(path)["params"].size == 9
    assert not sw.diff(path, STATE).value


# Names as a file system has them: bytes without a slash or null, which Python shows as text.
segments = st.one_of(
    st.sampled_from(NAMES + tuple(name for name, *_ in UNUSABLE)),
    st.text(max_size=80),
    st.binary(min_size=1, max_size=40).map(os.fsdecode),
).map(lambda text: text.replace("/", "_").replace("\0", "_"))


def is_name(text: str) -> bool:
    """Whether a file can be called this."""
    try:
        return text not in ("", ".", "..") and len(os.fsencode(text)) <= 255
    except UnicodeEncodeError:
        return False
