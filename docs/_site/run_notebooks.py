"""Runs the notebooks of `docs/notebooks/` and stores what they show: `python docs/_site/run_notebooks.py`.

The cells of a notebook run in order in one namespace, in this process.  A cell shows what it prints, and its last
expression where that has a value: as text, and as HTML where the value has a `_repr_html_` (its text is then what
`print` shows).  That is what Jupyter does, without a kernel, a server or the packages for them.

The tests run the notebooks too, and compare: stored outputs that are no longer true fail (`tests/docs/test_site.py`).
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"


def run_cell(source: str, namespace: dict[str, Any], name: str) -> tuple[str, Any]:
    """Runs one cell; returns what it printed, and the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value = None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    return printed.getvalue(), value


def outputs_of(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    """Returns what a cell shows, in the notebook format."""
    shown: list[dict[str, Any]] = []
    if printed:
        shown.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is not None:
        html = hasattr(value, "_repr_html_")
        data = {"text/plain": (str(value) if html else repr(value)).splitlines(keepends=True)}
        if html:
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        shown.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return shown


def run(notebook: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the notebook with the outputs of a run from top to bottom."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            printed, value = run_cell("".join(cell["source"]), namespace, f"{name}[{count}]")
            cell = {**cell, "execution_count": count, "outputs": outputs_of(printed, value, count)}
        cells.append(cell)
    return {**notebook, "cells": cells}


def main() -> None:
    """Runs all notebooks, or those named, and writes them back."""
    for path in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        notebook = run(json.loads(path.read_text(encoding="utf-8")), path.name)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
