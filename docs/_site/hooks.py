"""Changes the pages before mkdocs renders them.

The site is built from `docs/`, whose pages are readable without it.  Three things are added while it is built:

- notebooks become pages: each `.ipynb`, with its stored outputs, is turned into Markdown;
- `README.md`, `CONTRIBUTING.md` and `CHANGELOG.md`, which are outside `docs/`, are shown too, and links that leave
  `docs/` for one of them (or come back from there) lead to where they are in the site, so that a strict build
  checks these links like any other;
- `python no-run` is a language to our tests only, and a block of `>>>` prompts is highlighted as a session.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "project/overview.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
INSIDE = {page: source for source, page in OUTSIDE.items()}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")
FENCE = re.compile(r"^(?P<fence> *```)python[^\n]*\n(?P<prompt> *>>>)?", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Turns on instant navigation if the site has an address."""
    if config.site_url:
        # Not for a site that is read from a folder: there the theme would stop before it adds the copy buttons.
        config.theme["features"].append("navigation.instant")
    return config


def notebook_to_markdown(notebook: dict[str, Any]) -> str:
    """Returns the cells of a notebook and what they printed or showed, as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                # A blank line would end the block of HTML for Markdown.
                html = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))
                parts.append(f'<div class="output">\n{html}\n</div>')
            else:
                text = "".join(output.get("text", data.get("text/plain", ()))).rstrip("\n")
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _moved_links(markdown: str, page: str) -> str:
    """Returns the text of a page, with links to where the linked files are in the site."""
    folder = posixpath.dirname(page)
    source = posixpath.dirname(INSIDE.get(page, f"docs/{page}"))  # seen from the repository's root

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(source, match["path"]))
        if target in OUTSIDE:
            target = OUTSIDE[target]
        elif target.startswith("docs/") and (page in INSIDE or target.endswith(".ipynb")):
            target = target.removeprefix("docs/")
        else:
            return match["path"]
        target = re.sub(r"\.ipynb$", ".md", target)  # to the page, not to the file that it is made from
        return posixpath.relpath(target, folder or ".")

    return LINK.sub(moved, markdown)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made here: one for each notebook, and those from outside `docs/`."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            page = file.src_uri.removesuffix(".ipynb") + ".md"
            text = notebook_to_markdown(json.loads(file.content_string))
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links and the languages of code blocks, page by page."""
    markdown = FENCE.sub(
        lambda match: f"{match['fence']}{'pycon' if match['prompt'] else 'python'}\n{match['prompt'] or ''}", markdown
    )
    return _moved_links(markdown, page.file.src_uri)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Removes from the API page where a public name is defined: a reader imports it from `statewise`."""
    return re.sub(r'\s+title="[^"]*\bstatewise\._src\b[^"]*"', "", output) if page.file.src_uri == "api.md" else output
