"""The pages of docs/howto/: each question is in the index, no link leads nowhere.  Their code runs in test_doctests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HOWTO = Path(__file__).parents[2] / "docs" / "howto"
PAGES = sorted(HOWTO.glob("*.md"))
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """What a Markdown renderer calls a heading in links."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)]+)\)", prose(page)) if "://" not in link]


def questions(page: Path) -> list[str]:
    return re.findall(r"^## (.*\?)$", prose(page), re.MULTILINE)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not part or part in anchors(target), link


def test_every_question_is_in_the_index() -> None:
    index = links(HOWTO / "README.md")
    asked = [f"{page.name}#{anchor(question)}" for page in PAGES for question in questions(page)]
    assert len(asked) >= 22
    assert sorted(asked) == sorted(link for link in index if "#" in link)
