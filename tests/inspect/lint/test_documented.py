"""Each rule is explained in docs/lint.md, with a model that breaks it and one that follows the hint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from statewise._src.inspect.lint.lint import RULES

PAGE = (Path(__file__).parents[3] / "docs" / "lint.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^##? |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_the_page_explains_the_rules_that_there_are() -> None:
    assert sorted(SECTIONS) == sorted(rule.code for rule in RULES)


@pytest.mark.parametrize("code", [rule.code for rule in RULES])
def test_a_section_has_a_repro_and_a_hint(code: str) -> None:
    # tests/docs/test_doctests.py runs them.
    before, *blocks = re.split(r"^```python\n", SECTIONS[code], flags=re.MULTILINE)
    run = "".join(block.partition("\n```")[0] for block in blocks)
    assert len(before.split()) > 5, "the section begins with a sentence on the fault"
    assert f'"{code}"' in run, "the code shows a model that has the fault"
    assert "== []" in run, "the code shows a model in which lint finds nothing"
    assert "# the hint" in run, "a comment marks the line that follows the hint"
