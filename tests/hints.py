"""`parses`: a hint that is code is Python, whatever words stand around it."""

from __future__ import annotations

import ast
import re

# Words before the code: "or, where the function only evaluates: model.eval() as its first line".
_WORDS = re.compile(r"^(?:or,? |and )?(?:[A-Za-z][\w' ,-]*: )?")
_AFTER = re.compile(r"(?: as its first line)?(?:, and (?=@)|$)")


def code_in(hint: str) -> list[str]:
    """The pieces of code in a hint, one for each line, without the words around them."""
    pieces: list[str] = []
    for line in hint.splitlines():
        bare = _WORDS.sub("", line.strip(), count=1)
        pieces += [piece for piece in _AFTER.split(bare) if piece]
    return pieces


def parses(hint: str | None) -> list[ast.Module]:
    """Asserts that each line of a hint is Python, a decorator with a function below it; returns what was parsed."""
    assert hint, "there is no hint"
    return [ast.parse(f"{piece}\ndef f(): ..." if piece.startswith("@") else piece) for piece in code_in(hint)]
