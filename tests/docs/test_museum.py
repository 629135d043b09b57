"""The museum of lost state: each page has its three parts, the index has each page, and says of it what it shows.

That the programs run, and fail as they are said to, is held by `test_doctests.py`, which executes every page.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from code_blocks import FENCE, PARSER, code_blocks

MUSEUM = Path(__file__).parents[2] / "docs" / "museum"
PAGES = sorted(path for path in MUSEUM.glob("*.md") if path.name != "README.md")
PARTS = (r"On (NNX|Orbax|NNX and Orbax) alone", r"What Statewise says", r"Done right")
THREAD = re.compile(r"\b[\w.-]+/[\w.-]+#\d+\b")
FILE = re.compile(r"\b[\w.-]+/[\w.-]+, `[\w./-]+")
ROW = re.compile(
    r"^\| \[(?P<number>\d+)\]\((?P<file>[^)]+)\) \| (?P<lost>[^|]+) \| (?P<says>[^|]+) \| (?P<when>[^|]+) \|$"
)
LONGEST = 30  # lines of a failing program, imports and empty lines left out

every_page = pytest.mark.parametrize("page", [pytest.param(path, id=path.stem) for path in PAGES])


def parts_of(page: Path) -> tuple[str, dict[str, str]]:
    """What stands above the first heading of a part, and the text below each; headings inside code do not count."""
    text = page.read_text(encoding="utf-8")
    inside = [match.span() for match in FENCE.finditer(text)]
    headings = [
        match
        for match in re.finditer(r"^## (.+)$", text, re.MULTILINE)
        if not any(start < match.start() < end for start, end in inside)
    ]
    ends = [match.start() for match in headings[1:]] + [len(text)]
    parts = {match[1]: text[match.end() : end] for match, end in zip(headings, ends, strict=True)}
    return text[: headings[0].start()], parts


def program(part: str) -> str:
    """The blocks of a part that are executed as they stand."""
    return "\n".join(code for code, _ in code_blocks(part) if not PARSER.get_examples(code))


def shown(part: str) -> Sequence[str]:
    """What the prompts of a part are said to print."""
    return [example.want for code, _ in code_blocks(part) for example in PARSER.get_examples(code) if example.want]


def rows() -> list[dict[str, str]]:
    lines = (MUSEUM / "README.md").read_text(encoding="utf-8").splitlines()
    return [match.groupdict() for line in lines if (match := ROW.match(line))]


def test_at_least_fifteen_failures_stand() -> None:
    assert len(PAGES) >= 15


@every_page
def test_a_page_has_its_three_parts_in_order(page: Path) -> None:
    _, parts = parts_of(page)
    assert len(parts) == len(PARTS), list(parts)
    for heading, pattern in zip(parts, PARTS, strict=True):
        assert re.fullmatch(pattern, heading), heading


@every_page
def test_a_page_says_where_the_failure_was_read(page: Path) -> None:
    introduction, _ = parts_of(page)
    assert THREAD.search(introduction) or FILE.search(introduction)


@every_page
def test_a_failing_program_knows_nothing_of_statewise_and_asserts_the_loss(page: Path) -> None:
    failing = program(next(iter(parts_of(page)[1].values())))
    tree = ast.parse(failing)
    nodes = list(ast.walk(tree))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith("statewise") for name in imported)
    assert "sw" not in {node.id for node in nodes if isinstance(node, ast.Name)}
    assert any(isinstance(node, ast.Assert) for node in tree.body)
    lines = [line for line in failing.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(lines) <= LONGEST


@every_page
def test_what_statewise_says_is_shown_as_it_is_printed(page: Path) -> None:
    assert shown(parts_of(page)[1]["What Statewise says"])


@every_page
def test_the_program_done_right_asserts_that_nothing_is_lost(page: Path) -> None:
    right = ast.parse(program(parts_of(page)[1]["Done right"]))
    assert any(isinstance(node, ast.Assert) for node in right.body)


def test_the_index_has_every_page_once_and_in_order() -> None:
    assert [row["file"] for row in rows()] == [page.name for page in PAGES]
    for number, (row, page) in enumerate(zip(rows(), PAGES, strict=True), start=1):
        assert int(row["number"]) == number
        assert page.name.startswith(f"{number:02d}-")
        assert page.read_text(encoding="utf-8").startswith(f"# {number}. ")


@pytest.mark.parametrize("row", [pytest.param(row, id=row["file"]) for row in rows()])
def test_what_the_index_says_of_a_page_is_on_it(row: dict[str, str]) -> None:
    text = parts_of(MUSEUM / row["file"])[1]["What Statewise says"]
    for name in re.findall(r"`([^`]+)`", row["says"]):
        assert name in text, name


def test_the_readme_counts_the_pages() -> None:
    readme = (MUSEUM.parent.parent / "README.md").read_text(encoding="utf-8")
    assert f"[the museum of lost state](docs/museum/README.md), {len(PAGES)} programs" in readme
    assert f"The museum has {len(PAGES)} such failures" in readme
