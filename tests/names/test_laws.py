"""There and back is the identity to the bit, for every combination of pattern, stacking and joining."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise._src.names.layout import Layout
from statewise._src.names.name import Name
from statewise._src.names.names import NamesData
from statewise._src.names.pieces import pieces

LETTERS = "abcdef"
DTYPES = (np.float32, np.int8, np.float64, ml_dtypes.bfloat16, np.bool_)


@st.composite
def grouped(draw: Any, axes: list[str]) -> list[list[str]]:
    """Axes in some order, in groups; and some axes of length 1."""
    order = draw(st.permutations(axes))
    groups: list[list[str]] = []
    for axis in order:
        if groups and groups[-1] and draw(st.booleans()):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    for at in draw(st.lists(st.integers(0, len(groups)), max_size=1)):
        groups.insert(at, [])
    return groups


def written(groups: list[list[str]]) -> str:
    return " ".join({0: "1", 1: group[0] if group else ""}.get(len(group), f"({' '.join(group)})") for group in groups)


@st.composite
def cases(draw: Any) -> tuple[Name, tuple[int, ...], tuple[int, ...]]:
    """A name, the shape of our array, and the shape of theirs as a whole."""
    axes = list(LETTERS[: draw(st.integers(1, 4))])
    lengths = {axis: draw(st.integers(1, 4)) for axis in axes}
    stacked = draw(st.integers(0, min(2, len(axes) - 1)))
    theirs = [[axis] for axis in axes[:stacked]] + draw(grouped(axes[stacked:]))
    ours = draw(grouped(axes))
    known = {axis for group in ours for axis in group[:-1]} | {
        axis for axis in axes if draw(st.integers(0, 3)) == 0 and draw(st.booleans())
    }
    shapes = [tuple(math.prod(lengths[axis] for axis in group) for group in side) for side in (theirs, ours)]
    fields = "".join(f".{{n{number}}}" for number in range(stacked))
    each = shapes[0][stacked:]
    names: list[str] = [f"x{fields}.w"]
    options: dict[str, Any] = {}
    if each and draw(st.booleans()):
        join = draw(st.integers(-len(each), len(each) - 1))
        cut = draw(st.integers(0, each[join]))
        names = [f"x{fields}.{part}" for part in "kv"]
        options = {"join": join, "sizes": (cut, each[join] - cut)}
    pattern = f"{written(theirs)} -> {written(ours)}"
    return Name(names, pattern, **options, **{axis: lengths[axis] for axis in known}), shapes[1], shapes[0]


@given(cases(), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
def test_there_and_back_is_the_identity(case: Any, dtype: Any, seed: int) -> None:
    name, shape, theirs = case
    layout = Layout.of(name, {}, shape)
    bits = np.random.default_rng(seed).integers(0, 2, (*shape, np.dtype(dtype).itemsize), np.uint8)
    array = bits.view(dtype)[..., 0] if np.dtype(dtype) == np.bool_ else _random(shape, dtype, seed)
    files = layout.to_theirs(array)
    assert {file: part.shape for file, part in files.items()} == layout.names
    assert layout.stacked + layout._each == theirs
    read: list[str] = []

    def of(file: str) -> np.ndarray:
        read.append(file)
        return np.asarray(files[file])

    back = layout.to_ours(of)
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert sorted(read) == sorted(layout.names), "each of their arrays is read once"


@settings(max_examples=10)  # each shape compiles
@given(cases(), st.integers(0, 2**32 - 1))
def test_on_the_device_it_is_the_same(case: Any, seed: int) -> None:
    name, shape, _ = case
    layout = Layout.of(name, {}, shape)
    array = _random(shape, np.uint32, seed)
    files, expected = layout.to_theirs(jnp.asarray(array)), layout.to_theirs(array)
    assert all(np.array_equal(files[file], part) for file, part in expected.items())
    assert np.array_equal(layout.joined(files), array)


@given(cases(), st.data())
def test_every_part_comes_in_pieces_of_theirs(case: Any, data: st.DataObject) -> None:
    """What one device has of an array, in pieces of any size; judged by einops and slices of NumPy."""
    name, shape, _ = case
    layout = Layout.of(name, {}, shape)
    array = np.arange(math.prod(shape)).reshape(shape)
    files = layout.to_theirs(array)
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    elements = data.draw(st.integers(1, 9))
    out = np.full(array[tuple(index)].shape, -1)
    count = 0
    every = pieces(layout, index, out)
    for piece in (smaller for one in every for smaller in one.cut(elements)):
        part = np.asarray(files[piece.name])[piece.index]
        assert not piece.is_direct or piece.into.size == part.size
        piece.into[...] = part.reshape(piece.shape)[(*piece.within, ...)]
        count += piece.into.size
    assert np.array_equal(out, array[tuple(index)])
    assert count == out.size, "nothing is there twice"


def _random(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    count = math.prod(shape) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)


@given(cases())
def test_a_name_is_its_code_and_its_json(case: Any) -> None:
    import json
    import pickle

    import statewise as sw

    name, _, _ = case
    names = NamesData({"ours/w": name, "b": "b", "c": None})
    known = {"sw": type("sw", (), {"Name": Name, "Names": NamesData})}
    assert eval(repr(name), known) == name
    assert eval(repr(names), known) == names
    assert hash(eval(repr(names), known)) == hash(names)
    assert NamesData.from_dict(json.loads(json.dumps(names.to_dict()))) == names
    assert pickle.loads(pickle.dumps(names)) == names
    assert sw.__version__


def test_what_is_stacked_is_in_the_order_of_the_numbers() -> None:
    layout = Layout.of(Name("h.{i}.w", "layer o i -> i layer o"), {}, (3, 12, 2))
    files = layout.to_theirs(np.arange(72).reshape(3, 12, 2))
    assert list(files) == [f"h.{number}.w" for number in range(12)]
    assert files["h.10.w"].tolist() == np.arange(72).reshape(3, 12, 2)[:, 10, :].T.tolist()


def test_heads_are_split_and_joined_as_by_hand() -> None:
    """The example of the design: three matrices of each layer, in one kernel."""
    rng = np.random.default_rng(0)
    layers, width, head, sizes = 2, 5, 4, (8, 4, 4)
    name = Name(
        ["h.{i}.q.weight", "h.{i}.k.weight", "h.{i}.v.weight"],
        "layer (n h) d -> layer d n h", h=head, join=0, sizes=sizes,
    )  # fmt: skip
    files = {
        f"h.{layer}.{part}.weight": rng.normal(size=(size, width)).astype(np.float32)
        for layer, (part, size) in itertools.product(range(layers), zip("qkv", sizes, strict=True))
    }
    by_hand = np.stack(
        [
            np.concatenate([files[f"h.{layer}.{part}.weight"] for part in "qkv"]).T.reshape(width, 4, head)
            for layer in range(layers)
        ]
    )
    layout = Layout.of(name, {}, (layers, width, 4, head))
    assert np.array_equal(layout.to_ours(files.__getitem__), by_hand)
    assert all(np.array_equal(part, files[file]) for file, part in layout.to_theirs(by_hand).items())
