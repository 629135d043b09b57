"""What of a hint is code, and whether that code is Python.

A hint is prose with code in it: `or, for all of them at once: kinds = kinds | sw.Kinds(rest=sw.Kind(...))`.  `code_in`
takes such a text apart, from the coarse to the fine: the hint as a block, its lines, what follows a colon, what stands
between "or" and "and", and at last the calls, assignments and keyword arguments among the words.  Each piece that is
Python is a fragment; words are left alone; what looks like code and is not Python is an error (`NotCodeError`).

`tests/conftest.py` asks this of every error, warning and finding that any test makes.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from functools import cache, wraps
from typing import Any

OPEN, CLOSE = "([{", ")]}"
# A call, an index, or an assignment: `name(`, `name.other[`, `name=`, `name = `.  A keyword that is only named
# ("leave key= out") has neither a value behind it nor a space before it.
_STARTS = re.compile(r"(?<![\w.'\"])@?[A-Za-z_][\w.]*(?:[(\[]|=(?=[^\s=,.;)])| = (?=\S))")
_FIRST = re.compile(r"@\w|with [\w.]+\(|def \w|import \w|from [\w.]+ import")
# Where prose joins pieces of code, the widest first.
_JOINTS = (r"; ", r": ", r",? (?:or|and|say)\b,? ", r", ", r" -- ")


class NotCodeError(AssertionError):
    """A hint with a piece that looks like code and is not Python."""


@cache
def code_in(hint: str) -> tuple[str, ...]:
    """The fragments of a hint that are Python, in their order; raises `NotCodeError` for one that only looks so."""
    try:
        return tuple(_taken_apart(_unindented(hint)))
    except NotCodeError as error:
        raise NotCodeError(f"{error}\nin the hint:\n{textwrap.indent(hint, '    ')}") from None


def parses(hint: str | None) -> tuple[str, ...]:
    """Asserts that a hint has code, and that all its code is Python; returns the code."""
    assert hint, "there is no hint"
    found = code_in(hint)
    assert found or as_python(hint), f"no code in: {hint}"
    return found


def code_of(thing: object, having: str = "") -> str:
    """The first fragment of the hint of an error, a warning or a finding, of those that hold the words `having`."""
    found = [code for code in parses(getattr(thing, "hint")) if having in code]  # noqa: B009 (any of three classes)
    assert found, f"no code with {having!r} in: {thing}"
    return found[0]


def check_hints_of(made: type[Any]) -> None:
    """From here on, each object of a class that is made has its hint looked at, where it is made."""
    init = made.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        if self.hint:
            code_in(self.hint)

    made.__init__ = checked  # type: ignore[misc]  # a test room of its own: nothing else puts one in its place


def as_python(text: str) -> ast.Module | None:
    """The text as Python: statements, a decorator, the head of a block, keyword arguments; None where it is neither."""
    for form in ("{}", "{}\ndef f(): ...", "{}\n    ...", "f({})"):
        try:
            return ast.parse(form.format(text))
        except SyntaxError:
            continue
    return None


def _taken_apart(text: str) -> Iterator[str]:
    text = text.strip()
    if not text:
        return
    tree = as_python(text)
    if tree is not None:
        _check_subscripts_of_self(tree, text)
        if _is_more_than_words(text):
            yield text
        return
    blocks = list(_blocks(text))
    if len(blocks) > 1:
        for block in blocks:
            yield from _taken_apart(re.sub(r"^(?:or|and),? ", "", block))
        return
    bare = _without_comment(text)
    if bare != text:
        yield from _taken_apart(bare)
        return
    if (away := _out_of_balance(text)) is not None:
        raise NotCodeError(f"A bracket {away!r} has no partner: {text}")
    for joint in _JOINTS:
        pieces = _split(text, joint)
        if len(pieces) > 1:
            for piece in pieces:
                yield from _taken_apart(piece)
            return
    yield from _among_words(text)


def _among_words(text: str) -> Iterator[str]:
    """The calls, assignments and keyword arguments in a piece of prose without joints."""
    if _FIRST.match(text) and not text.startswith("@"):
        raise NotCodeError(f"It begins as code, and is not Python: {text}")
    if "`" in text:
        yield from _quoted(text)
        return
    at = 0
    while start := _STARTS.search(text, at):
        ends = [end for end in _ends(text, start.end()) if as_python(text[start.start() : end]) is not None]
        if not ends:
            raise NotCodeError(f"It looks like code, and is not Python: {text[start.start() :]}")
        at = max(ends)
        fragment = text[start.start() : at]
        tree = as_python(fragment)
        assert tree is not None
        _check_subscripts_of_self(tree, fragment)
        yield fragment


def _quoted(text: str) -> Iterator[str]:
    """What stands between backticks: all of it is code."""
    for code in text.split("`")[1::2]:
        if as_python(code) is None:
            raise NotCodeError(f"It is quoted as code, and is not Python: {code}")
        yield code


def _ends(text: str, after: int) -> Iterator[int]:
    """Where a fragment may end whose beginning reaches to `after`: outside brackets and strings, where a word ends."""
    depth = 1 if text[after - 1] in OPEN else 0
    for at, char, level in _walked(text, after, depth):
        if level == 0 and at > after and (char in " ,.;:`" or text[at - 1] in CLOSE):
            yield at
    if not _open_at_end(text, after, depth):
        yield len(text)


def _check_subscripts_of_self(tree: ast.Module, text: str) -> None:
    """A module has attributes: `self[('kernel',)] = ...` is Python that does nothing for anybody."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "self":
            raise NotCodeError(f"A module is not indexed, its attributes are set: {text}")


def _is_more_than_words(text: str) -> bool:
    return re.search(r"[(\[{=@.'\"]|^return ", text) is not None and text != "..."


def _unindented(hint: str) -> str:
    return textwrap.dedent(hint).strip("\n")


def _blocks(text: str) -> Iterator[str]:
    """Lines that belong together: a decorator with its function, `with` with its body."""
    block: list[str] = []
    for line in text.splitlines():
        if block and not line.startswith((" ", "\t")) and not block[-1].startswith("@"):
            yield "\n".join(block)
            block = []
        block.append(line)
    yield "\n".join(block)


def _without_comment(text: str) -> str:
    for at, char, _ in _walked(text, 0, 0):
        if char == "#" and text[:at].endswith("  "):
            line_end = text.find("\n", at)
            return text[:at].rstrip() + ("" if line_end < 0 else text[line_end:])
    return text


def _split(text: str, joint: str) -> list[str]:
    """The text cut at each joint that stands outside brackets and strings."""
    outside = {at for at, _, level in _walked(text, 0, 0) if level == 0}
    pieces, last = [], 0
    for found in re.finditer(joint, text):
        of_lambda = joint == ": " and re.search(r"\blambda\b[^:]*$", text[last : found.start()])
        if found.start() in outside and found.start() >= last and not of_lambda:
            pieces.append(text[last : found.start()])
            last = found.end()
    return [*pieces, text[last:]]


def _out_of_balance(text: str) -> str | None:
    stack: list[str] = []
    for _, char, _ in _walked(text, 0, 0):
        if char in OPEN:
            stack.append(char)
        elif char in CLOSE and (not stack or OPEN.index(stack.pop()) != CLOSE.index(char)):
            return char
    return stack[-1] if stack else None


def _open_at_end(text: str, after: int, depth: int) -> bool:
    for _, char, _ in _walked(text, after, depth):
        depth += (char in OPEN) - (char in CLOSE)
    return depth > 0


def _walked(text: str, start: int, depth: int) -> Iterator[tuple[int, str, int]]:
    """Each character outside strings: its place, itself, and how many brackets are open before it."""
    at = start
    while at < len(text):
        char = text[at]
        # An apostrophe within a word ("the model's") opens no string; nor does one that is never closed.
        begins = not text[at - 1 : at].isalnum() or re.search(r"(?<![\w'])[fFrRbBuU]$", text[:at])
        if char in "'\"" and begins and (end := text.find(char, at + 1)) > 0:
            at = end + 1
            continue
        yield at, char, depth
        depth = max(0, depth + (char in OPEN) - (char in CLOSE))
        at += 1
