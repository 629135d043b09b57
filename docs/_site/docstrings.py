"""Docstrings as the API page shows them: our `Example:` sections are read as the `Examples:` that griffe knows.

Under any other heading griffe reads `>>> names["a"][0]` as Markdown, with a link in it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the heading, in memory only."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each thing that it has read from the source."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
