"""Every example in a docstring, and every ```python block of README.md and docs/*.md, is run.

Docstrings are found in the source rather than on imported objects: so an example is never missed because a
decorator (or the runtime type checker) put another object in its place, and each one is a test of its own.

A Markdown file is one test: its blocks run in order in one module, as a reader would type them.  A block that
holds `>>>` prompts is checked as a doctest; any other is executed.  A block opened with ```python no-run is left
out; so is every other language.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from code_blocks import PARSER, code_blocks
from stores import make_buckets

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str, int]]:
    """Yields (qualified name, docstring, line it starts on) for a module and everything defined in it."""
    if isinstance(node, DOCUMENTED):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield prefix, text, node.body[0].lineno - 1
    for child in ast.iter_child_nodes(node):
        inner = f"{prefix}.{child.name}".lstrip(".") if isinstance(child, DOCUMENTED[1:]) else prefix
        yield from docstrings(child, inner)


def source_examples() -> list[object]:
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        for name, text, line in docstrings(ast.parse(file.read_text(encoding="utf-8"))):
            if PARSER.get_examples(text):
                found.append(pytest.param(file, name, text, line, id=f"{module_name(file)}:{name}"))
    return found


def run_doctest(text: str, globs: dict[str, object], name: str, file: Path, line: int) -> None:
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    report: list[str] = []
    test = PARSER.get_doctest(text, globs, name, str(file), line)
    runner.run(test, out=report.append, clear_globs=False)
    assert runner.failures == 0, "".join(report)
    globs.update(test.globs)  # what a block defines, the blocks after it may use


@pytest.mark.parametrize(("file", "name", "text", "line"), source_examples())
def test_docstring(
    file: Path, name: str, text: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # an example that writes a file leaves none in the repository
    module = importlib.import_module(module_name(file))
    run_doctest(text, dict(vars(module)), name or module.__name__, file, line)


def run_markdown(file: Path, module: types.ModuleType) -> int:
    blocks = list(code_blocks(file.read_text(encoding="utf-8")))
    for code, line in blocks:
        if PARSER.get_examples(code):
            run_doctest(code, vars(module), file.name, file, line)
            continue
        # The empty lines put a traceback on the Markdown file's own line.
        exec(compile("\n" * line + code, str(file), "exec"), vars(module))
    return len(blocks)


# Pages with code for packages that Statewise does not need; the test extra has them.
NEEDS = {"docs/howto/instruments.md": ("matplotlib", "tensorboardX")}


# Pages with code for object stores, which run on loopback for them, and the bucket that they name on each.
BUCKETS = {"docs/object-stores.md": "my-bucket"}


def markdown_files() -> list[Path]:
    return [file for file in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if file.exists()]


@pytest.mark.parametrize("file", [pytest.param(file, id=str(file.relative_to(ROOT))) for file in markdown_files()])
def test_markdown(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for package in NEEDS.get(str(file.relative_to(ROOT)), ()):
        pytest.importorskip(package)
    if bucket := BUCKETS.get(str(file.relative_to(ROOT))):
        make_buckets(bucket, request)
    monkeypatch.chdir(tmp_path)
    # A real module, since dataclasses and `module:qualname` references look it up by name.
    module = types.ModuleType(re.sub(r"\W", "_", f"markdown_{file.stem}"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with jax.numpy_rank_promotion("allow"):  # a reader's JAX is as it comes
        run_markdown(file, module)


def test_markdown_blocks_share_one_namespace_and_fail_loudly(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(
        "# Page\n```python\nx = 1\n```\n1. item\n   ```python\n   x += 1\n   ```\n"
        "```bash\nfalse\n```\n```python no-run\nraise SystemExit\n```\n```python\n>>> x\n2\n>>> y = x\n```\n"
    )
    assert run_markdown(file, page := types.ModuleType("page")) == 3
    assert page.y == 2
    file.write_text(file.read_text().replace(">>> x\n2", ">>> x\n3"))
    with pytest.raises(AssertionError, match=r"line 16(.*\n)+.*Expected:\s+3\s+Got:\s+2"):
        run_markdown(file, types.ModuleType("page"))
