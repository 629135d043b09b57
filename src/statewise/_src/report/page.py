"""The page: one HTML file that contains its style, scripts and data.

Nothing in the data is ever interpreted as HTML or as a script.  It is JSON in a `<script type="application/json">`,
with every `<`, `>` and `&` escaped, so that no user's text can end the element; the scripts insert it as text, never as
markup.  In addition, the page's Content-Security-Policy only runs the script with the hash that it lists, and does not
allow any request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
from importlib import resources
from typing import Any

from statewise._src.common.tables import printable

__all__ = ["SCRIPTS", "embedded", "page"]

# In this order: each uses the ones before it.
SCRIPTS = ("words.js", "tree.js", "treemap.js", "table.js", "sections.js", "main.js")


def page(data: dict[str, Any]) -> str:
    """Renders the page of a report's data.

    Args:
      data: the result of `Report.to_dict`, with `segments`, the keys of the path, in each of its leaves.
    """
    style, script = _asset("page.css"), _script()
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    parts = {
        "TITLE": html.escape(printable(str(data["title"]))),
        "POLICY": html.escape(policy),
        "STYLE": style,
        "DATA": embedded(data),
        "SCRIPT": script,
    }
    # In one pass, so that placeholders in the inserted text are not replaced.
    pieces = _asset("page.html").split("%%")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def embedded(data: object) -> str:
    """Writes data as JSON that is safe inside an HTML element, whatever text it contains.

    Args:
      data: data that JSON can represent, with finite numbers.

    Example:
      >>> from statewise._src.report.page import embedded
      >>> embedded({"path": "</script>"})
      '{"path":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _asset(name: str) -> str:
    return resources.files("statewise._src.report").joinpath("assets", name).read_text(encoding="utf-8")


@functools.cache
def _script() -> str:
    """Returns all scripts as one, inside a function: they share their names and define no globals."""
    return "\n".join(['"use strict";', "(() => {", *map(_asset, SCRIPTS), "})();"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
