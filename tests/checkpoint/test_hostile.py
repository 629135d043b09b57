"""Manifests made to harm, with a digest that holds: refused in words, with nothing run, written or filled in memory."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statewise as sw
from damaging import plan, state, words
from signing import LAYOUTS, NAME, content_of, corrupted, little_memory, rewritten, saved, signed
from statewise._src.checkpoint.format.manifest import content_text


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(saved(request.param), tmp_path / "copy")
    return tmp_path / "copy"


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_content_signed_again_is_the_same_manifest(folder: Path) -> None:
    assert signed(content_of(folder)) == (folder / NAME).read_bytes()
    assert content_text(content_of(folder)) in (folder / NAME).read_text()


# --- any node replaced by any value --------------------------------------------------------------------------------


def nodes(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(inner, (*place, key))


def replaced(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return content


def value_at(content: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        content = content[key]
    return content


TEXTS = st.sampled_from(
    [
        *(
            "",
            "..",
            "/etc/passwd",
            "../../x",
            "a/b",
            "a.b",
            "\0",
            "\ud800",
            "\x1b[2J",
            "x" * 2000,
            "rbg",
            "clip",
            "load",
        ),
        *(
            "object",
            "O",
            "float",
            "V8",
            "S3",
            "key",
            "float64",
            "int4",
            "os:system",
            "flax.nnx:Param",
            "params",
            "packed",
        ),
    ]
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 2**31, 2**60, 2**64, 10**400, 1.0, -0.5, 1e308, True, False, None])
SCALARS = st.one_of(TEXTS, NUMBERS, st.integers(), st.text(max_size=5))
TAGGED = st.builds(
    lambda tag, value: {tag: value},
    st.sampled_from(["tuple", "float", "bytes", "bool", "none", "type", "repr", "bytes", "sha256", "path"]),
    st.one_of(SCALARS, st.lists(SCALARS, max_size=3)),
)
VALUES = st.recursive(
    st.one_of(SCALARS, TAGGED),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
PLACES = {layout: [*nodes(content_of(saved(layout)))] for layout in LAYOUTS}


@st.composite
def changes(draw: st.DrawFn) -> tuple[str, Any]:
    """A layout, and the content of its manifest with some node replaced, often by a value from elsewhere in it."""
    layout = draw(st.sampled_from(LAYOUTS))
    content = content_of(saved(layout))
    places = st.sampled_from(PLACES[layout])
    place = draw(places)
    return layout, replaced(content, place, draw(st.one_of(VALUES, places.map(functools.partial(value_at, content)))))


@settings(max_examples=150)
@given(changes())
@example(("named", []))
@example(("named", {}))
@example(("named", None))
def test_whatever_a_manifest_says_it_is_refused_in_words_or_the_values_are_right(change: tuple[str, Any]) -> None:
    layout, content = change
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "inner" / "checkpoint"
        shutil.copytree(saved(layout), folder)
        (folder / NAME).write_bytes(signed(content))
        before = everything_under(Path(outside))
        target = state(7)
        try:
            str(sw.inspect(folder))
            str(sw.preview(folder, plan().abstract()))
            restored, _ = sw.restore(folder, target)
        except (sw.CorruptedError, sw.RestoreError):
            restored = None
        assert restored is None or words(restored) == words(state())
        assert words(target) == words(state(7))
        assert everything_under(Path(outside)) == before


# --- what an attacker would write ----------------------------------------------------------------------------------


FILES = ["../statewise.json", "/etc/passwd", "a/../../b", "a//b", "./a", "", "..", "c:x", "a\\b", "a\0b", "d/"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_lies_outside_is_refused(name: str, folder: Path) -> None:
    rewritten(folder, lambda content: content["files"].update({name: {"bytes": 3}}))
    with corrupted(folder, "a file is outside of the checkpoint"):
        sw.restore(folder, state())


def test_a_file_whose_name_is_no_text_is_refused(folder: Path) -> None:
    rewritten(folder, lambda content: content["files"].update({"a\ud800": {"bytes": 3}}))
    with corrupted(folder, "the name of a file is not UTF-8"):
        sw.restore(folder, state())


SHA = "0" * 64
PAIR = "a pair of numbers is not a list of two"
FACTS: list[tuple[dict[str, Any], str]] = [
    ({}, "a file has other fields"),
    ({"bytes": 9, "size": 9}, "a file has other fields"),
    ({"bytes": -1}, "the size of a file is not a count"),
    ({"bytes": 9, "sha256": 9}, "a file's checksum is not text"),
    ({"bytes": 2**31, "sha256": SHA}, "a file is too large for a checksum of its own"),
    ({"bytes": 2**40, "sha256": SHA, "parts": [[0, 2**31]]}, "a file is too large for a checksum of its own"),
    ({"bytes": 9, "parts": [[0, 1]]}, "parts of a file have no checksum"),
    ({"bytes": 9, "sha256": SHA, "parts": {}}, "its parts are not a list"),
    ({"bytes": 9, "sha256": SHA, "parts": [[8, 2]]}, "a part of a file extends beyond its end"),
    ({"bytes": 9, "sha256": SHA, "parts": [[0, 2], [1, 2]]}, "the parts of a file overlap"),
    ({"bytes": 9, "sha256": SHA, "parts": [[2, 0]]}, "the parts of a file overlap"),
    ({"bytes": 9, "sha256": SHA, "parts": [[True, 1]]}, "a number is not a count"),
    ({"bytes": 9, "sha256": SHA, "parts": [[0]]}, PAIR),
]


@pytest.mark.parametrize(("facts", "what"), FACTS, ids=str)
def test_facts_of_a_file_that_cannot_be_are_refused(facts: Any, what: str, folder: Path) -> None:
    rewritten(folder, lambda content: content["files"].update({"_METADATA": facts}))
    with corrupted(folder, what):
        sw.restore(folder, state())


@pytest.mark.parametrize("key", [["a/b"], ["a.b"], ["..", "x"], [""], [], [1], ["a", None]], ids=str)
def test_a_key_that_orbax_could_read_as_another_is_refused(key: Any, folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(key=key, buffer=None))
    with corrupted(folder, "a key is invalid"):
        sw.restore(folder, state())


def test_a_key_that_is_no_text_is_refused(folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(key=["a\ud800"], buffer=None))
    with corrupted(folder, "a key is not UTF-8"):
        sw.restore(folder, state())


@pytest.mark.parametrize("sums", [[], [1], [1, 2, 3], "12", None, {"a": 1, "b": 2}], ids=str)
@pytest.mark.parametrize("field", ["sums", "buffer", "stored"])
def test_a_pair_that_is_none_is_named(sums: Any, field: str, folder: Path) -> None:
    if field != "sums" and sums is None:
        return  # which says that there is none
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update({field: sums}))
    with corrupted(folder, "a stored array is not a list of two" if field == "stored" else PAIR):
        sw.restore(folder, state())


@pytest.mark.parametrize("path", [[{"float": "x"}], [{"bytes": "x"}]], ids=str)
def test_a_path_that_no_key_is_made_of_is_named(path: Any, folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0].update(path=path))
    with corrupted(folder, "a path is invalid"):
        sw.restore(folder, state())


@pytest.mark.parametrize("key", [["nowhere"], ["layers"], ["layers", "0"]], ids=str)
def test_an_array_that_orbax_does_not_have_is_named(key: list[str], folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(key=key, buffer=None))
    with pytest.raises(sw.CorruptedError) as caught:
        sw.restore(folder, state())
    if "two arrays have one key" not in caught.value.message:
        assert [leaf.path for leaf in caught.value.leaves] == [("half",)]


def test_an_array_that_stands_nowhere_is_refused(folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(key=None, buffer=None))
    with corrupted(folder, "an array is not stored"):
        sw.restore(folder, state())


@pytest.mark.parametrize("below", [[], ["below"]])
def test_two_arrays_at_one_key_or_one_below_another_are_refused(below: list[str]) -> None:
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "checkpoint"
        shutil.copytree(saved("named"), folder)

        def change(content: Any) -> None:
            first, second, *_ = [array for leaf in content["leaves"] for array in leaf["arrays"]]
            second["key"] = [*first["key"], *below]

        rewritten(folder, change)
        with corrupted(folder, "two arrays have one key"):
            sw.restore(folder, state())


SHAPES: list[tuple[Any, str]] = [
    ([2**62], "an axis is not a count"),
    ([2**61, 2**61], "an array is larger than any can be"),
    ([1] * 65, "an array is larger than any can be"),
    ([-1], "an axis is not a count"),
    ([2.0], "an axis is not a count"),
    ([True], "an axis is not a count"),
    (["2"], "an axis is not a count"),
    ([[2]], "an axis is not a count"),
    ("22", "its shapes are not a list"),
    (None, "its shapes are not a list"),
]


@pytest.mark.parametrize(("shape", "what"), SHAPES, ids=str)
def test_a_shape_that_is_none_is_refused(shape: Any, what: str, folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(shape=shape))
    with corrupted(folder, what):
        sw.restore(folder, state())


NAMES = [
    "object",
    "O",
    "str",
    "S8",
    "U4",
    "M8",
    "V8",
    "void",
    "float",
    "int",
    "datetime64",
    "load",
    "key",
    "float7",
    "",
]


@pytest.mark.parametrize("name", [*NAMES, "float32 ", "Float32", 32, None, ["float32"]])
def test_a_dtype_that_is_none_of_numbers_is_refused(name: Any, folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(dtype=name))
    with corrupted(folder, f"the dtype {str(name)!r} is unknown"):
        sw.restore(folder, state())


def test_a_huge_array_takes_no_memory() -> None:
    """It is stored as it was: to believe the manifest would take exbibytes."""

    def change(content: Any) -> None:
        for leaf in content["leaves"]:
            for array in leaf["arrays"]:
                array["shape"] = [2**60]
                if array["stored"]:
                    array["stored"][0] = [2**60, 2]

    with tempfile.TemporaryDirectory() as outside, little_memory():
        folder = Path(outside) / "checkpoint"
        shutil.copytree(saved("named"), folder)
        rewritten(folder, change)
        assert sw.inspect(folder)["params"].size == 5 * 2**60
        with pytest.raises(sw.RestoreError):
            sw.restore(folder, state())


def test_a_buffer_that_lies_about_its_size_takes_no_memory() -> None:
    def change(content: Any) -> None:
        for buffer in content["buffers"]:
            buffer["elements"] = 2**60
        content["leaves"][0]["arrays"][0]["buffer"][1] = 2**60 - 5

    with tempfile.TemporaryDirectory() as outside, little_memory():
        folder = Path(outside) / "checkpoint"
        shutil.copytree(saved("packed"), folder)
        rewritten(folder, change)
        with pytest.raises(sw.CorruptedError) as caught:
            sw.restore(folder, state())
        assert ("half",) in [leaf.path for leaf in caught.value.leaves]


def test_an_array_beyond_its_buffer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved("packed"), folder)
    rewritten(folder, lambda content: content["leaves"][0]["arrays"][0].update(buffer=[0, 1]))
    with corrupted(folder, "an array extends beyond its buffer"):
        sw.restore(folder, state())


def test_a_leaf_that_is_listed_twice_is_refused(folder: Path) -> None:
    rewritten(folder, lambda content: content["leaves"].append(content["leaves"][0] | {"arrays": []}))
    with corrupted(folder, "a leaf's value is not an array"):
        sw.restore(folder, state())
    again = {"key": None, "buffer": None, "shape": [0]}
    rewritten(
        folder,
        lambda content: content["leaves"].__setitem__(
            -1, content["leaves"][0] | {"arrays": [content["leaves"][0]["arrays"][0] | again]}
        ),
    )
    with corrupted(folder, "it lists a leaf twice"):
        sw.restore(folder, state())


def test_a_path_that_is_nested_without_end_is_refused(folder: Path) -> None:
    key: Any = "x"
    for _ in range(17):
        key = {"tuple": [key]}
    rewritten(folder, lambda content: content["leaves"][0].update(path=[key]))
    with corrupted(folder, "a path is invalid"):
        sw.restore(folder, state())


@pytest.mark.parametrize("place", ["/nowhere/at/all", "../../../../../../etc", "a\ud800", "x" * 5000])
def test_a_base_is_only_looked_for(place: str, folder: Path) -> None:
    rewritten(folder, lambda content: content.update(base={"path": place, "digest": "0"}))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(folder, state())
    assert "was saved over another checkpoint, which is not at" in caught.value.message
    assert caught.value.hint is not None
    assert "base=" in caught.value.hint
