"""What an editor tells a user: a file that uses everything passes both type checkers, and each mistake is found."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import statewise as sw

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
USED, WRONG = HERE / "used.py", HERE / "wrong.py"
CHECKERS = ("mypy", "pyright")

# A user has the package installed, so that nothing is said of it, and Optax and Orbax, which have no type information.
MYPY = """\
[mypy]
strict = true
follow_imports = silent
[mypy-optax.*,orbax.*]
ignore_missing_imports = true
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[tuple[str, int, str]]]:
    """Returns by checker the file, the line and the text of each error: each checker runs once, both at a time."""
    folder = tmp_path_factory.mktemp("typing")
    (folder / "mypy.ini").write_text(MYPY)
    files = [os.path.relpath(file, folder) for file in (USED, WRONG)]  # absolute ones it does not take
    project = {"include": files, "extraPaths": [str(ROOT / "src")], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(project))
    mypy = ["mypy", "--config-file", str(folder / "mypy.ini"), "--cache-dir", str(ROOT / ".mypy_cache" / "users")]
    mypy += ["--no-error-summary", "--hide-error-context", "--no-pretty", str(USED), str(WRONG)]
    pyright = ["pyright", "--outputjson", "-p", str(folder), "--pythonpath", sys.executable]
    # Neither looks for a newer version of itself.
    environment = {**os.environ, "MYPYPATH": str(ROOT / "src"), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    running = {
        args[0]: subprocess.Popen(
            [sys.executable, "-m", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for args in (mypy, pyright)
    }
    output = {name: process.communicate(timeout=600) for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 1, f"{name} did not run: {output[name]}"  # 0 would be no error in wrong.py
    lines = re.findall(r"^(.*?):(\d+): error: (.*)$", output["mypy"][0], re.MULTILINE)
    found = json.loads(output["pyright"][0])["generalDiagnostics"]
    return {
        "mypy": {(Path(file).name, int(line), text) for file, line, text in lines},
        "pyright": {
            (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"])
            for each in found
            if each["severity"] == "error"
        },
    }


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_file_that_uses_everything_passes(checker: str, complaints: dict[str, set[tuple[str, int, str]]]) -> None:
    assert sorted(one for one in complaints[checker] if one[0] == USED.name) == []


@pytest.mark.parametrize("checker", CHECKERS)
def test_each_mistake_is_found_on_its_line(checker: str, complaints: dict[str, set[tuple[str, int, str]]]) -> None:
    marked = {number for number, line in enumerate(WRONG.read_text().splitlines(), 1) if "# wrong: " in line}
    assert len(marked) >= 10
    assert {line for file, line, _ in complaints[checker] if file == WRONG.name} == marked


def test_every_public_name_is_used() -> None:
    nodes = list(ast.walk(ast.parse(USED.read_text())))
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {str(node.arg) for node in nodes if isinstance(node, ast.keyword)}
    used |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    public = {*sw.__all__, *sw.results.__all__}
    for cls in (sw.Kinds, sw.Kind, sw.Plan, sw.State, sw.Checkpoints, sw.results.Step):
        public |= {name for name in vars(cls) if not name.startswith("_")}
    assert public - used == {"of"}, "Plan.of is for the package itself"
