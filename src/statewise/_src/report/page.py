"""The page: one HTML file with its style, its scripts and its data in it.

Nothing in the data is ever read as HTML or as a script.  It stands as JSON in a `<script type="application/json">`,
with every `<`, `>` and `&` written as an escape, so that no text of a user's can end the element; the scripts make text
of it, never markup.  Besides, the page's own policy (Content-Security-Policy) lets run only the script whose hash it
names, and lets nothing be fetched from anywhere.
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

# In this order: each uses what stands before it.
SCRIPTS = ("words.js", "tree.js", "treemap.js", "table.js", "sections.js", "main.js")


def page(data: dict[str, Any]) -> str:
    """Writes the page of a report's data.

    Args:
      data: what `Report.to_dict` returns, with `segments`, the keys of each leaf's path, in each of its leaves.
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
    # In one pass: what is put in is not looked through for more of these.
    pieces = _asset("page.html").split("%%")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def embedded(data: Any) -> str:
    """Data as JSON that can stand within an element of HTML, whatever text is in it.

    Args:
      data: what JSON can hold; numbers are finite.

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
    """All scripts as one, within a function: they share names, and leave none behind."""
    return "\n".join(['"use strict";', "(() => {", *map(_asset, SCRIPTS), "})();"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
