"""Names as data: what is refused when they are declared, and how names and shapes follow from our paths and shapes."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import statewise as sw
from refusals import refused
from statewise._src.names.layout import Layout
from statewise._src.names.pattern import Pattern
from statewise._src.names.template import Template


@pytest.mark.parametrize(
    ("pattern", "axes", "fact", "hint"),
    [
        ("o i", {}, "has to have one arrow, from their axes to ours", "o i -> i o"),
        ("o i -> i o -> o", {}, "has to have one arrow, from their axes to ours", "o i -> i o"),
        ("o i -> i", {}, "cannot be inverted: o is on one side only", "o i -> i o"),
        ("o -> o i", {}, "cannot be inverted: i is on one side only", "o i -> i o"),
        ("o i -> i o", {"h": 3}, "has no axis h, whose length is given", "o i -> i o"),
        ("o i -> i o", {"o": 0}, "has an axis o of length 0", "o=64"),
        ("o i -> i o", {"o": True}, "has an axis o of length True", "o=64"),
        (
            "n h d -> (n h) d",
            {},
            "does not say how (n h) is divided into n and h",
            "sw.Name(..., 'n h d -> (n h) d', h=64)",
        ),
        ("(o i -> i o", {}, 'cannot be read: Imbalanced parentheses in expression: "(o i"', "o i -> i o"),
        ("o o -> o", {}, 'cannot be read: Indexing expression contains duplicate dimension "o"', "o i -> i o"),
        ("2 i -> i 2", {}, "has a number as an axis; only 1 can be one", "sw.Name(..., '(n h) d -> d n h', h=64)"),
        ("(... i) o -> o (... i)", {}, "has ... in parentheses, which has no inverse", "... o i -> ... i o"),
        ("... i o -> o i", {}, "cannot be inverted: … is on one side only", "o i -> i o"),
    ],
)
def test_patterns_that_are_refused(pattern: str, axes: dict[str, int], fact: str, hint: str) -> None:
    with refused(sw.DeclarationError, f"The pattern {pattern!r} {fact}.", hint=hint):
        sw.Name("w", pattern, **axes)


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda: sw.Name(""), "'' is not a name.", "'layers/{i}/kernel'"),
        (
            lambda: sw.Name("a{i"),
            "The name 'a{i' has a brace that is not part of a placeholder.",
            "'layers/{i}/kernel'",
        ),
        (
            lambda: sw.Name("a{}"),
            "The name 'a{}' has a brace that is not part of a placeholder.",
            "'layers/{i}/kernel'",
        ),
        (lambda: sw.Name("a", h=3), "h=3 is the length of an axis, but there is no pattern.", "'a'"),
        (lambda: sw.Name("a", join=0), "'a' is one name, and there is nothing to join.", "'a'"),
        (
            lambda: sw.Name([]),
            "The names of a Name are empty, not a text or several.",
            "sw.Name('model.embed_tokens.weight')",
        ),
        (
            lambda: sw.Name(3),  # type: ignore[arg-type]
            "The names of a Name are int, not a text or several.",
            "sw.Name('model.embed_tokens.weight')",
        ),
        (
            lambda: sw.Name(["q", "k"]),
            "Several names need an axis along which they are joined, not join=None.",
            "sw.Name(['q', 'k'], join=0)",
        ),
        (lambda: sw.Name("a", 3), "A pattern is a text, not int.", "'o i -> i o'"),  # type: ignore[arg-type]
        (lambda: sw.Name("a", b"o i -> i o"), "A pattern is a text, not bytes.", "'o i -> i o'"),  # type: ignore[arg-type]
        (lambda: sw.Name(["q", "q"], join=0), "The names 'q', 'q' are not different.", "sw.Name(['q', 'k'], join=0)"),
        *(
            (
                lambda path=path: sw.Names({path: "a"}),
                f"{path!r} is not a path of a leaf.",
                "'layers/{i}/kernel', where {i} is any one key",
            )
            for path in ("/a", "a//b", "a/", "layers/**/a")
        ),
        (
            lambda: sw.Name(["q.{i}", "k"], join=0),
            "The names 'q.{i}', 'k' have different placeholders.",
            "sw.Name(['layers.{i}.q', 'layers.{i}.k'], join=0)",
        ),
        (
            lambda: sw.Name(["q", "k"], join=0, sizes=(1,)),
            "sizes=(1,) does not give a length for each of 2 names.",
            "sizes=(1, 2)",
        ),
        (
            lambda: sw.Names([("a", "b")]),  # type: ignore[arg-type]
            "Names are a mapping from our paths to theirs, not list.",
            "sw.Names({'embed/embedding': 'model.embed_tokens.weight'})",
        ),
        (
            lambda: sw.Names({"layers/{i}/w": "w"}),
            "The leaves 'layers/{i}/w' differ in {i}, which 'w' does not have.",
            "a name with {i}: 'model.layers.{i}.weight'",
        ),
        (lambda: sw.Names.from_dict([]), "This is not the data of Names.", "what names.to_dict() returned"),
        (lambda: sw.Name.from_dict({"a": 1}), "This is not the data of a Name.", "what name.to_dict() returned"),
    ],
)
def test_what_is_refused_when_it_is_declared(make: Any, message: str, hint: str) -> None:
    with refused(sw.DeclarationError, message, hint=hint):
        make()


def test_a_name_does_not_change() -> None:
    name = sw.Name("a")
    with pytest.raises(AttributeError, match="A Name does not change"):
        name.join = 3
    with pytest.raises(TypeError):
        sw.Names({"a": "b"})["a"] = None  # type: ignore[index]


def test_without_einops_only_patterns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops.parsing", None)
    monkeypatch.setitem(sys.modules, "einops", None)
    assert sw.Name("a").pattern is None
    with refused(
        sw.StatewiseError,
        "A pattern needs the package einops, which is not installed.",
        hint="pip install 'statewise[names]'",
    ):
        sw.Name("a", "o i -> i o")


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("layers/{i}/w", "layers/3/w", {"i": "3"}),
        ("layers/{i}/w", "layers/a.b/w", {"i": "a.b"}),
        ("layers/{i}/w", "layers/3/4/w", None),
        ("layers/{i}/w", "layers//w", None),
        ("model.layers.{i}.w", "model.layers.12.w", {"i": "12"}),
        ("model.layers.{i}.w", "model.layers.1.2.w", None),
        ("model.layers.{i}.w", "modelxlayers.1.w", None),
        ("block_{i}/{j}", "block_1/x", {"i": "1", "j": "x"}),
        ("{i}/{i}", "a/a", {"i": "a"}),
        ("{i}/{i}", "a/b", None),
        ("w", "w", {}),
    ],
)
def test_templates(text: str, name: str, values: dict[str, str] | None) -> None:
    template = Template.parse(text)
    assert template.match(name) == values
    if values is not None:
        assert template.fill(values) == name


@pytest.mark.parametrize(
    ("pattern", "axes", "ours", "theirs"),
    [
        ("o i -> i o", {}, (2, 3), (3, 2)),
        ("(n h) d -> d n h", {"h": 4}, (5, 2, 4), (8, 5)),
        ("(n h) d -> d n h", {}, (5, 2, 4), (8, 5)),
        ("n h d -> (n h) d", {"h": 4}, (8, 5), (2, 4, 5)),
        ("o 1 -> o", {}, (7,), (7, 1)),
        ("... o i -> ... i o", {}, (1, 2, 3, 4), (1, 2, 4, 3)),
        ("... o i -> ... i o", {}, (3, 4), (4, 3)),
        ("o i -> i o", {}, (0, 3), (3, 0)),
        ("->", {}, (), ()),
    ],
)
def test_their_shape_follows_from_ours(
    pattern: str, axes: dict[str, int], ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    assert Pattern.parse(pattern, axes).their_shape(ours) == theirs


@pytest.mark.parametrize(
    ("name", "shape", "fact"),
    [
        (sw.Name("w", "o i -> i o"), (3,), "has 1 axes, and 'o i -> i o' 2"),
        (sw.Name("w", "... o i -> ... i o"), (3,), "has 1 axes, and '... o i -> ... i o' at least 2"),
        (
            sw.Name("w", "n h d -> (n h) d", h=4),
            (6, 2),
            "has an axis of 6, which is not divisible by h=4 as 'n h d -> (n h) d' has it",
        ),
        (sw.Name("w", "i o -> o i", i=3), (2, 4), "has an axis of 4, which is not i=3 as 'i o -> o i' has it"),
        (sw.Name("w", "o -> o 1"), (2, 4), "has an axis of 4, which is not 1 as 'o -> o 1' has it"),
        (sw.Name("w.{i}.{j}"), (2,), "has 1 axes there, which is not enough to stack i, j"),
        (sw.Name(["a", "b"], join=1), (2,), "has 1 axes there, and is joined along axis 1"),
        (sw.Name(["a", "b"], join=0), (3,), "has an axis of 3 there, which is not 2 equal parts: it needs sizes="),
        (sw.Name(["a", "b"], join=0, sizes=(1, 3)), (3,), "has an axis of 3 there, and sizes=(1, 3) add up to 4"),
    ],
)
def test_what_does_not_fit_a_shape(name: sw.Name, shape: tuple[int, ...], fact: str) -> None:
    with pytest.raises(ValueError, match="has ") as caught:
        Layout.of(name, {}, shape)
    assert str(caught.value) == fact
