"""The English of the package: words that must not come back, and docstrings of functions that open with a verb."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "statewise"

# Everything that a user reads.
READ = ("src/statewise", "docs", "README.md", "CONTRIBUTING.md")

# Each pattern with what to write instead.
WORDS = {
    r"(?<!there )\b(?:is|are) no (?!longer|more|larger|smaller|slower|fewer|less)": "is not a, are not",
    r"\b(?:names|knows|says) no\b": "does not ...",
    r"\btold\b": "known, determined, reported",
    r"\banew\b": "again, new",
    r"\bmeanwhile\b": "at the same time",
    r"\bbegun\b": "started",
    r"\bin the place of\b": "instead of, in place of",
    r"\bof what\b": "say which thing",
    r"\bwhat of\b": "say which part",
    r"\bso many\b": "this many",
    r"\bin turn\b": "one after the other",
    r"\b(?:lies?|lay)\b": "is placed, is sharded, is on",
    r"\bstands?\b(?! for)": "is, appears",
    r"\bmends?\b": "hint",
    r"\bspent\b": "donated",
    r"\btraps?\b": "rule, mistake",
    r"\bunasked\b": "by default",
    r"\bdamaged?\b": "corrupted",
    r"\btreatments?\b": "handling",
    r"\bshall\b": "must, should",
    r"\bnobody\b": "no one, nothing",
    r"\bas yet\b": "so far",
    r"\belse than\b": "other than",
    r"\w*(?:normalis|recognis|serialis|initialis|organis|synchronis)\w*": "American spelling: -ize",
    r"\w*(?:colour|behaviour|neighbour|favour)\w*|\btowards\b|\bcentre\b": "American spelling",
}
PATTERN = {re.compile(pattern, re.IGNORECASE): instead for pattern, instead in WORDS.items()}


def _files(suffixes: tuple[str, ...]) -> Iterator[Path]:
    for name in READ:
        path = ROOT / name
        assert path.exists(), f"{name} has moved"
        yield from sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.suffix in suffixes)


def _prose_of_python(text: str) -> Iterator[tuple[int, str]]:
    """Yields the strings and comments of a module with their lines; the pieces of f-strings without their code."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Examples in docstrings are code.
            lines = [re.sub(r"^\s*(?:>>>|\.\.\.) .*", "", line) for line in node.value.split("\n")]
            # So are keys, and what stands in backticks: a manifest of format 1 has the key `treatment`.
            if not node.value.isidentifier():
                yield node.lineno, re.sub(r"`[^`]*`", "", " ".join(" ".join(lines).split()))


def _prose(file: Path) -> Iterator[tuple[int, str]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield from _prose_of_python(text)
    else:
        is_code = False
        for number, line in enumerate(text.splitlines(), start=1):
            is_code ^= line.lstrip().startswith("```")
            if not is_code:
                yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)  # without code, and where links lead


def test_words_that_must_not_come_back() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {match[0]!r} (instead: {instead}) in "
        f"{text[max(0, match.start() - 40) :][:90]!r}"
        for file in _files((".py", ".html", ".js", ".css", ".md"))
        for line, text in _prose(file)
        for pattern, instead in PATTERN.items()
        for match in [pattern.search(text)]
        if match
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("3 is no filter.", True),
        ("There is no kind 'gates'.", False),
        ("It is no longer needed.", False),
        ("A state in the place of the model", True),
        ("where each array lies", True),
        ("`-` stands for leaves without an array", False),
        ("the module that it stands in", True),
        ("normalises its weights", True),
        ("A multiline layout", False),
    ],
)
def test_the_patterns_find_what_they_mean(text: str, bad: bool) -> None:
    assert any(pattern.search(text) for pattern in PATTERN) == bad


# Words that end in s and are not verbs.
NO_VERBS = {"This", "Its", "As", "Is", "Has", "Was", "Always", "Kinds", "Leaves", "Values", "Names", "Paths", "Arrays"}


def test_docstrings_of_functions_open_with_a_verb() -> None:
    wrong = []
    for file in _files((".py",)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            words = (ast.get_docstring(node) or "").split()
            if words and (not re.fullmatch(r"[A-Z][a-z]+s[,;:.]?", words[0]) or words[0].rstrip(",;:.") in NO_VERBS):
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name}: {' '.join(words[:8])}")
    assert not wrong, "\n".join(wrong)
