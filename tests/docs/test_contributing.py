"""CONTRIBUTING: the diffs of its walks apply to the code and do what they promise, and its map has every package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


Hunk = tuple[str, str, str]  # a file, its lines before and after

# What the three walks promise, for a copy of the source with all their diffs applied.
PROMISED = """
import hashlib, json, pathlib, sys
import jax, jax.numpy as jnp
from flax import nnx
import statewise as sw

half = nnx.Dict(mean=nnx.BatchStat(jnp.ones(3, jnp.bfloat16)))
assert [finding.code for finding in sw.lint(half)] == ["half-precision-statistic"]
assert sw.lint(nnx.Dict(mean=nnx.BatchStat(jnp.ones(3)))) == []

model = nnx.Dict(wide=nnx.Param(jnp.zeros((8, 12))), tall=nnx.Param(jnp.zeros((4, 9))), small=nnx.Param(jnp.zeros(3)))
plan = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.LongestAxis("model"))).plan(model)
placed = plan.shardings(jax.sharding.AbstractMesh((4,), ("model",)))["params"]
assert [tuple(placed[name].spec) for name in ("wide", "tall", "small")] == [(None, "model"), ("model",), ()]

golden, new = sys.argv[1:]
state = sw.plan(model).take(model)
sw.save(new, state)
assert json.load(open(f"{new}/statewise.json"))["statewise"] == 2
assert sw.restore(new, state)[1].ok
assert json.load(open(f"{golden}/statewise.json"))["statewise"] == 1
assert sw.inspect(golden)["params"].leaves > 0

manifest = pathlib.Path(new, "statewise.json")
content = manifest.read_text().partition('"content":')[2].removesuffix("}\\n")  # of format 2, said to be of format 1
digest = hashlib.sha256(content.encode()).hexdigest()
manifest.write_text(f'{{"statewise":1,"sha256":"{digest}","content":{content}}}\\n')
try:
    sw.inspect(new)
    raise SystemExit("a manifest of format 1 has a field of format 2")
except sw.CorruptedError as error:
    assert "a kind has other fields" in error.message
"""


def hunks() -> Iterator[Hunk]:
    for block in re.findall(r"^```diff\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^--- a/", block, flags=re.MULTILINE)[1:]:
            name = part.partition("\n")[0]
            for hunk in re.split(r"^@@[^\n]*\n", part, flags=re.MULTILINE)[1:]:
                lines = hunk.splitlines()
                old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
                yield name, old, new


@pytest.mark.parametrize(("name", "old", "new"), list(hunks()))
def test_a_diff_fits_the_code(name: str, old: str, new: str) -> None:
    places = (ROOT / name).read_text(encoding="utf-8").count(old)
    assert places == 1, f"{name} has changed where CONTRIBUTING.md shows it: bring the diff there up to date"
    assert old != new


def test_the_walks_do_what_they_promise(tmp_path: Path) -> None:
    for folder in ("src", "docs", "tests/golden"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in hunks():
        file = tmp_path / name
        file.write_text(file.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    command = [sys.executable, "-c", PROMISED, str(tmp_path / "tests/golden/v1-named"), str(tmp_path / "new")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_there_are_three_walks_with_diffs() -> None:
    walks = re.split(r"^## (?=\w+ walk: )", TEXT, flags=re.MULTILINE)[1:]
    assert len(walks) == 3
    assert all("```diff\n" in walk for walk in walks)


def test_the_map_has_every_package_in_the_order_of_the_arrow() -> None:
    map_ = TEXT[TEXT.index("_src/  ") : TEXT.index("  cli/")]
    named = re.findall(r"^    (\w+)/ ", map_, re.MULTILINE)
    source = ROOT / "src" / "statewise" / "_src"
    assert sorted(named) == sorted(folder.name for folder in source.iterdir() if (folder / "__init__.py").exists())
    arrow = re.search(r"^common -> .*$", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert arrow is not None
    assert arrow[0].split(" -> ") == [*named, "cli"]


def test_a_file_that_is_named_is_there() -> None:
    pages = TEXT + (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = [
        f"/{file.relative_to(ROOT)}" for folder in ("src", "tests", "docs") for file in (ROOT / folder).rglob("*.*")
    ]
    named = sorted(set(re.findall(r"`([\w/]+\.(?:py|pyi|md|txt))`", pages)))
    assert len(named) > 40
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == ["CHANGELOG.md"]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`make ([\w-]+)`", TEXT))))
def test_a_command_is_there(name: str) -> None:
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
