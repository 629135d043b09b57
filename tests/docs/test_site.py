"""The site: it builds strictly, all pages are in it, the API page has every public name, notebooks say what is true.

The code on the pages is run by `test_doctests.py`.
"""

from __future__ import annotations

import html
import importlib.util
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from mkdocs.config import load_config

import statewise as sw
from statewise import results, testing

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def load(name: str) -> types.ModuleType:
    """One of the site's own tools: they are scripts beside the pages, and no package."""
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "_site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(part)


@pytest.fixture(scope="module")
def nav() -> list[str]:
    return list(pages_of(load_config(str(ROOT / "mkdocs.yml")).nav))


def test_the_site_builds_strictly_with_every_page_of_the_navigation(site: Path, nav: list[str]) -> None:
    files = [page.replace("README", "index").removesuffix(".md") + ".html" for page in nav]
    assert [file for file in files if not (site / file).exists()] == []


def test_every_page_is_in_the_navigation_once(nav: list[str]) -> None:
    made = set(load("hooks").OUTSIDE.values())
    made |= {str(file.relative_to(DOCS).with_suffix(".md")) for file in NOTEBOOKS}
    assert sorted(nav) == sorted(made | {str(file.relative_to(DOCS)) for file in DOCS.rglob("*.md")})


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = "".join(file.read_text(encoding="utf-8") for file in site.rglob("*.html"))
    assert re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(?:https?:)?//[^"]*"', pages) == []
    assert 'class="mermaid"' not in pages  # the theme would load the program that draws it


def test_every_public_name_is_on_the_api_page_once() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    wanted = [f"statewise.{name}" for name in sw.__all__] + [f"statewise.results.{name}" for name in results.__all__]
    asserts = [f"statewise.testing.{name}" for name in testing.__all__]
    assert sorted(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) == sorted(wanted + asserts)


def test_the_api_page_shows_every_docstring(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in (*sw.__all__, *(f"results.{name}" for name in results.__all__)):
        assert f'id="statewise.{name}"' in text
    assert "<code>*types</code>" in text  # arguments are told apart from the text around them
    assert "_src" not in text  # where a name is defined is no reader's concern
    assert "<code>Missing</code>" not in text  # annotations name nothing private
    assert "Example:" not in text  # each stands under the heading that is rendered as code


def test_an_annotation_shows_what_a_private_alias_means(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    assert re.search(r"missing\s+\(Literal\['error', 'keep', 'restart'\]", html.unescape(text))


def shown(notebook: dict[str, Any]) -> list[str]:
    """What the cells of a notebook show, as text."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    return ["".join(output.get("text") or output["data"]["text/plain"]) for output in outputs]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in NOTEBOOKS])
def test_a_notebook_shows_what_a_run_of_it_shows(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = json.loads(path.read_text(encoding="utf-8"))
    with jax.numpy_rank_promotion("allow"):  # a reader's JAX is as it comes
        run = load("run_notebooks").run(stored, path.name)
    assert len(shown(stored)) > 3
    assert shown(run) == shown(stored), "python docs/_site/run_notebooks.py writes what is shown now"


def test_a_cell_shows_what_it_prints_and_its_last_value() -> None:
    tool = load("run_notebooks")
    cell = {"cell_type": "code", "source": ["print(x := 1)\n", "x + 1"], "outputs": []}
    silent = {"cell_type": "code", "source": ["y = x\n", "None"]}
    words = {"cell_type": "markdown", "source": ["# Words"]}
    run = tool.run({"cells": [words, cell, silent], "nbformat": 4}, "test")
    assert run["nbformat"] == 4
    assert run["cells"][0] == words
    assert shown(run) == ["1\n", "2"]
    assert [cell["execution_count"] for cell in run["cells"][1:]] == [1, 2]
    assert cell["outputs"] == []  # the notebook that went in is left as it was


def test_a_notebook_becomes_a_page() -> None:
    table = {"output_type": "execute_result", "data": {"text/plain": ["t"], "text/html": ["<b>\n", "\n", "t</b>"]}}
    printed = {"output_type": "stream", "name": "stdout", "text": ["1\n"]}
    code = {"cell_type": "code", "source": ["print(1)\n", "t"], "outputs": [printed, table]}
    page = load("hooks").notebook_to_markdown({"cells": [{"cell_type": "markdown", "source": ["# T"]}, code]})
    assert page == (
        "# T\n\n```python\nprint(1)\nt\n```\n\n```text\n1\n```\n\n"
        '<div class="output">\n<b>\nt</b>\n</div>\n'  # with no empty line, which would end the HTML
    )


@pytest.mark.parametrize(
    ("page", "link", "leads_to"),
    [
        ("howto/README.md", "../../README.md", "../project/overview.md"),
        ("index.md", "../README.md#install", "project/overview.md#install"),
        ("project/overview.md", "docs/lint.md", "../lint.md"),
        ("project/overview.md", "CONTRIBUTING.md", "contributing.md"),
        ("index.md", "notebooks/a.ipynb", "notebooks/a.md"),
        ("howto/loops.md", "../performance.md", "../performance.md"),
        ("lint.md", "https://example.org/README.md", "https://example.org/README.md"),
    ],
)
def test_a_link_leads_to_where_its_target_is_in_the_site(page: str, link: str, leads_to: str) -> None:
    at = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=page))
    assert load("hooks").on_page_markdown(f"see [it]({link}).", page=at) == f"see [it]({leads_to})."


def test_a_block_is_named_for_what_it_is() -> None:
    at = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="index.md"))
    text = "```python no-run\nx\n```\n```python\n>>> x\n```\n```bash\nx\n```\n"
    named = "```python\nx\n```\n```pycon\n>>> x\n```\n```bash\nx\n```\n"
    assert load("hooks").on_page_markdown(text, page=at) == named
