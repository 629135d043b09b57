"""CONTRIBUTING: the diffs of its walks fit the code of today, the map names the packages that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def hunks() -> Iterator[object]:
    """The file of each hunk of each diff, and the lines that the file has to have: those kept and those removed."""
    for block in re.findall(r"^```diff\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^--- a/", block, flags=re.MULTILINE)[1:]:
            name = part.partition("\n")[0]
            for number, hunk in enumerate(re.split(r"^@@[^\n]*\n", part, flags=re.MULTILINE)[1:]):
                lines = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
                yield pytest.param(name, "\n".join(lines), id=f"{name}:{number}")


@pytest.mark.parametrize(("name", "lines"), hunks())
def test_a_diff_fits_the_code(name: str, lines: str) -> None:
    assert f"{lines}\n" in (ROOT / name).read_text(encoding="utf-8"), "bring the walk up to date: apply it, run it"


def test_there_are_three_walks_with_diffs() -> None:
    walks = re.split(r"^## (?=\w+ walk: )", TEXT, flags=re.MULTILINE)[1:]
    assert len(walks) == 3
    assert all("```diff\n" in walk for walk in walks)


def test_the_map_has_every_package_in_the_order_of_the_arrow() -> None:
    map_ = TEXT[TEXT.index("_src/  ") : TEXT.index("  cli/")]
    named = re.findall(r"^    (\w+)/ ", map_, re.MULTILINE)
    source = ROOT / "src" / "statewise" / "_src"
    assert sorted(named) == sorted(folder.name for folder in source.iterdir() if (folder / "__init__.py").exists())
    arrow = re.search(r"^common -> .*$", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert arrow is not None
    assert arrow[0].split(" -> ") == [*named, "cli"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`make ([\w-]+)`", TEXT))))
def test_a_command_is_there(name: str) -> None:
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
