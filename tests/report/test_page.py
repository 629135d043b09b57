"""The page as text: what stands in it is safe whatever the data says, and it needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from reported import HOSTILE, Net, hostile
from statewise._src.report.page import SCRIPTS, embedded

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / "src" / "statewise" / "_src" / "report" / "assets"


class Elements(HTMLParser):
    """The elements of a page as an HTML parser sees them, and the text of its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.texts.append((self.inside, data))


def test_names_that_are_markup_stay_text() -> None:
    fine, attacked = Elements(sw.report(Net()).to_html()), Elements(hostile().to_html())
    assert attacked.tags == fine.tags
    assert "<script>window" not in hostile().to_html()


def test_a_title_that_is_markup_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>&amp;"
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    sw.save(folder, sw.plan(model).take(model))
    page = sw.report(folder).to_html()
    assert "<img" not in page
    assert html.escape(str(folder)) in page


def test_data_that_looks_like_a_part_of_the_page_is_data() -> None:
    model = nnx.Dict({"%%SCRIPT%%": nnx.Param(jnp.zeros(2)), "%%": nnx.Param(jnp.zeros(2))})
    page = sw.report(model).to_html()
    (data,) = re.findall(r'id="data">(.*?)</script>', page)
    assert [leaf["path"] for leaf in json.loads(data)["leaves"]] == ["%%", "%%SCRIPT%%"]


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_data_comes_back_and_holds_nothing_that_ends_an_element(data: object) -> None:
    text = embedded(data)
    assert json.loads(text) == data
    assert text.isascii()
    assert not set(text) & set("<>&\n\r")


def test_numbers_that_json_has_not_are_refused_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        embedded({"largest": float("nan")})


def test_a_difference_that_is_nan_can_be_shown() -> None:
    one, other = (nnx.Dict(w=nnx.Param(jnp.array([1.0, x]))) for x in (2.0, float("nan")))
    assert '"largest":"nan"' in sw.report(one, other).to_html()


def test_the_policy_names_the_pages_own_script_and_style_and_allows_no_other() -> None:
    page = Elements(sw.report(Net()).to_html())
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    texts = [(tag, text) for tag, text in page.texts if not text.startswith("{")]
    hashes = {tag: "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for tag, text in texts}
    assert [tag for tag, _ in texts] == ["style", "script"]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src '{hashes['style']}'; script-src '{hashes['script']}'"
    )


def test_the_page_refers_to_nothing_elsewhere() -> None:
    page = Elements(sw.report(Net()).to_html())
    links = [attrs[name] for _, attrs in page.tags for name in ("href", "src", "action") if attrs.get(name) is not None]
    assert links == ["data:,"]
    for file in ASSETS.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", text), file.name


def test_no_script_makes_markup_of_text() -> None:
    for file in ASSETS.glob("*.js"):
        found = re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", file.read_text())
        assert not found, f"{file.name}: {found}"


def test_every_asset_is_part_of_the_page() -> None:
    assert {file.name for file in ASSETS.iterdir()} == {"page.html", "page.css", *SCRIPTS}


def test_files_of_the_page_keep_the_rules_of_the_code() -> None:
    for file in ASSETS.iterdir():
        assert len(file.read_text(encoding="utf-8").splitlines()) < 400, file.name


def test_the_same_report_is_the_same_page() -> None:
    assert sw.report(Net()).to_html() == sw.report(Net()).to_html()


def test_a_page_is_small() -> None:
    """All that is not data: a mail can carry it, and a repository."""
    page = sw.report(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).to_html()
    assert len(page) < 80_000


def test_the_wheel_carries_what_stands_in_the_package() -> None:
    """Hatchling takes a package's folder with all that is in it, unless it is told otherwise or git ignores it."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["src/statewise"]}
    assert set(build) == {"targets"}


def test_a_page_replaces_the_file_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("x" * 1_000_000)
    report = sw.report(Net())
    report.write(file)
    assert file.read_text(encoding="utf-8") == report.to_html()
    assert b"\r" not in file.read_bytes()


def test_names_of_any_script_are_written_as_utf_8(tmp_path: Path) -> None:
    model = nnx.Dict({"層": nnx.Param(jnp.zeros(2)), "\ud800": nnx.Param(jnp.zeros(2))})
    sw.report(model).write(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'id="data">(.*?)</script>', text)
    assert [leaf["segments"] for leaf in json.loads(data)["leaves"]] == [["層"], ["\ud800"]]
    assert HOSTILE not in text
