"""The command line: what it prints, what it refuses in one line, its exit status, and how little `--help` imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from statewise.cli import main

SOURCE = Path(__file__).parents[2] / "src"
MODELS = """
import jax.numpy as jnp
from flax import nnx
import statewise as sw
from helper_of_models import WIDTH

print("a user's module may print")

class BatchStat(nnx.Variable): pass
class Buffer(nnx.Variable): pass
class CacheLike: pass

class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, WIDTH, rngs=rngs)
        self.stat = BatchStat(jnp.ones(2))
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.buffer = Buffer(jnp.ones(2), role="mask")

def make():
    print("a factory may print")
    return Model(nnx.Rngs(0))

def make_pair(): return make(), nnx.Linear(2, 2, rngs=nnx.Rngs(1))
def large(): return nnx.Linear(10**7, 10**7, rngs=nnx.Rngs(0))
def empty(): return nnx.Module()
def needs(size): return make()
def raises(): raise RuntimeError("no such\\n   data")
def leaves(): raise SystemExit(3)
def forgets(): make()
def unsortable(): return {1: make(), "a": make()}
def kinds(): return sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))

instance = make()
planned = sw.plan(instance)
partial_kinds = sw.Kinds(params=sw.Kind(nnx.Param))
double_kinds = kinds() | sw.Kinds(more=sw.Kind(nnx.Variable))
number = 3
class Holder:
    inner = make
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's modules in it, as the current one."""
    (tmp_path / "models_of_user.py").write_text(MODELS)
    (tmp_path / "helper_of_models.py").write_text("WIDTH = 3\n")
    (tmp_path / "breaks.py").write_text("import helper_of_models\n1 / 0\n")
    (tmp_path / "lacks.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "quits.py").write_text("raise SystemExit('usage: quits')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("models_of_user", "helper_of_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        path = list(sys.path)
        status = main(argv)
        assert sys.path == path, "what was importable before is so afterwards, and nothing else"
        out, err = capsys.readouterr()
        return status, out, err

    return run


# --- what it shows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["models_of_user:make", "models_of_user.py:make", "models_of_user:instance"])
def test_census(run: Run, target: str) -> None:
    status, out, _ = run("census", target)
    assert status == 0
    assert out.splitlines()[0] == "census"
    assert "Buffer 1, BatchStat 1" in out
    assert "a factory" not in out
    status, out, _ = run("census", target, "--json")
    data = json.loads(out)
    assert (status, data["total"]["leaves"]) == (0, 8)
    assert data["kinds"][0] | {"types": None, "dtypes": None} == {
        "name": "params",
        "leaves": 4,
        "size": 13,
        "nbytes": 52,
        "dtypes": None,
        "types": None,
        "handling": "-",
    }


def test_census_of_several_objects_of_an_attribute_and_of_nothing(run: Run) -> None:
    assert json.loads(run("census", "models_of_user:make_pair", "--json")[1])["total"]["leaves"] == 10
    assert json.loads(run("census", "models_of_user:Holder.inner", "--json")[1])["total"]["leaves"] == 8
    assert json.loads(run("census", "models_of_user:planned", "--json")[1])["total"]["leaves"] == 8
    status, out, _ = run("census", "models_of_user:empty", "--json")
    assert (status, json.loads(out)["total"]["leaves"]) == (0, 0)


def test_a_large_model_is_counted_without_its_arrays(run: Run) -> None:
    status, out, _ = run("census", "models_of_user:large", "--abstract", "--json")
    assert (status, json.loads(out)["total"]["nbytes"]) == (0, 4 * (10**14 + 10**7))


def test_plan(run: Run) -> None:
    status, out, _ = run("plan", "models_of_user:make")
    assert status == 0
    assert "linear/kernel  params     Param" in out
    assert "buffer         variables  Buffer" in out
    assert "cache" in out, "a kind that claims nothing is shown too"
    status, out, _ = run("plan", "models_of_user:make_pair", "--json")
    data = json.loads(out)
    assert [leaf["path"] for leaf in data["leaves"]][-2:] == ["1/bias", "1/kernel"]
    assert (data["total"]["leaves"], data["excluded"]) == (10, [])
    assert run("plan", "models_of_user:planned")[0] == 0


def test_plan_by_own_kinds(run: Run) -> None:
    for kinds in ("models_of_user:kinds", "models_of_user.py:kinds"):
        status, out, _ = run("plan", "models_of_user:make", "--kinds", kinds, "--json")
        assert (status, [kind["name"] for kind in json.loads(out)["kinds"]]) == (0, ["params", "rest"])


@pytest.mark.parametrize("command", ["plan", "census"])
def test_leaves_that_do_not_fit_are_findings(run: Run, command: str) -> None:
    target = (command, "models_of_user:make", "--kinds")
    status, out, err = run(*target, "models_of_user:partial_kinds")
    assert (status, out) == (1, "")
    assert "4 leaves are claimed by no kind." in err
    assert "buffer: Buffer(2,) float32" in err
    assert "hint: " in err
    status, out, _ = run(*target, "models_of_user:double_kinds", "--json")
    data = json.loads(out)
    assert (status, data["error"], len(data["leaves"])) == (1, "OverlapError", 4)
    assert data["leaves"][0]["note"]


def test_a_model_without_leaves_has_no_plan(run: Run) -> None:
    status, _, err = run("plan", "models_of_user:empty")
    assert status == 1
    assert "no leaves" in err


def test_explain(run: Run) -> None:
    status, out, _ = run("explain", "models_of_user:make", "Param & ~Path('norm/**')")
    assert status == 0
    assert out.splitlines()[0] == "Param & ~Path('norm/**')"
    assert "2 of 8" in out
    status, out, _ = run("explain", "models_of_user:make", "BatchStat | Meta('role', 'mask')", "--json")
    matched = [leaf["path"] for leaf in json.loads(out)["leaves"] if leaf["matched"]]
    assert (status, matched) == (0, ["buffer", "stat"]), "the module's own BatchStat, not NNX's"
    out = run("explain", "models_of_user:make_pair", "Path('bias')", "--json")[1]
    assert [leaf["path"] for leaf in json.loads(out)["leaves"] if leaf["matched"]] == ["1/bias"]


# --- what it refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("models_of_user", "'models_of_user' is not a target"),
        ("models_of_user:", "is not a target"),
        (":make", "is not a target"),
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("no.such.module:make", "there is no module 'no'"),
        ("models_of_user.inner:make", "there is no module 'models_of_user.inner'"),
        ("no_such_file.py:make", "there is no file 'no_such_file.py'"),
        ("models_of_user:mak", "has no 'mak'; did you mean 'make'?"),
        ("models_of_user:Holder.outer", "has no 'Holder.outer'"),
        ("models_of_user:number", "is int, not a function"),
        ("models_of_user:needs", "is a function that needs arguments (size)"),
        ("models_of_user:Model", "rngs"),
        ("models_of_user:raises", "models_of_user:raises() raised RuntimeError: no such data"),
        ("models_of_user:leaves", "raised SystemExit: 3"),
        ("models_of_user:forgets", "returned None; is a return missing?"),
        ("models_of_user:unsortable", "NNX cannot flatten dict"),
        ("models_of_user:partial_kinds", "is Kinds, not a function"),
        ("breaks:make", "the module 'breaks' cannot be imported: ZeroDivisionError: division by zero"),
        ("breaks.py:make", "the file 'breaks.py' cannot be run: ZeroDivisionError"),
        ("lacks:make", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("quits.py:make", "cannot be run: SystemExit: usage: quits"),
    ],
)
@pytest.mark.parametrize("command", ["census", "explain"])
def test_a_wrong_target_is_answered_in_one_line(run: Run, command: str, target: str, says: str) -> None:
    status, out, err = run(command, target, *(["..."] if command == "explain" else []))
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if "may print" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("statewise: ")
    assert says in lines[0]


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ("models_of_user:make", "is Model, not Kinds"),
        ("models_of_user:number", "is int, not a function"),
        ("models_of_user", "is not a target"),
        ("models_of_user:raises", "raised RuntimeError"),
    ],
)
def test_wrong_kinds_are_answered_in_one_line(run: Run, kinds: str, says: str) -> None:
    status, out, err = run("plan", "models_of_user:make", "--kinds", kinds)
    assert (status, out) == (2, "")
    assert says in err.splitlines()[-1]


def test_a_plan_takes_no_kinds(run: Run) -> None:
    assert run("plan", "models_of_user:planned", "--kinds", "models_of_user:kinds")[0] == 2
    assert run("census", "models_of_user:planned", "--kinds", "models_of_user:kinds")[0] == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a filter: SyntaxError"),
        ("Param &", "is not a filter: SyntaxError"),
        ("Param; Param", "is not a filter: SyntaxError"),
        ("\0", "is not a filter"),
        ("(" * 500, "is not a filter"),
        ("3", "'3' is not allowed in a filter"),
        ("Param + Cache", "'Param + Cache' is not allowed in a filter"),
        ("not Param", "is not allowed in a filter"),
        ("lambda path, leaf: True", "is not allowed in a filter"),
        ("__import__('os').system('true')", "is not allowed in a filter"),
        ("open('x')", "open(...) is not allowed in a filter"),
        ("models.Path('x')", "models.Path(...) is not allowed in a filter"),
        ("Where(Param)", "Where(...) is not allowed in a filter"),
        ("Path(name='x')", "is not allowed in a filter"),
        ("(x for x in y)", "is not allowed in a filter"),
        ("Param[0]", "is not allowed in a filter"),
        ("f'{Param}'", "is not allowed in a filter"),
        ("'a'.upper", "is not allowed in a filter"),
        ("NoSuchType", "there is no type 'NoSuchType'"),
        ("make", "there is no type 'make'"),
        ("nnx.no_such", "there is no type 'nnx.no_such'"),
        ("Param.__class__.__base__.__subclasses__", "there is no type"),
        ("Path(1 + x)", "is not a plain value"),
        ("Path()", "Path received wrong arguments"),
        ("Meta('a')", "Meta received wrong arguments"),
        ("Not(Param, Cache)", "Not received wrong arguments"),
        ("Path('a//b')", "has an empty segment"),
        ("Exactly('tag')", "Exactly takes types"),
        ("Exactly()", "needs at least one type"),
        ("All", "is a class of filters"),
    ],
)
def test_a_wrong_filter_is_answered_in_one_line(run: Run, text: str, says: str) -> None:
    status, out, err = run("explain", "models_of_user:instance", text)
    assert (status, out) == (2, "")
    lines = [line for line in err.splitlines() if "may print" not in line]
    assert len(lines) == 1
    assert says in lines[0]


# --- the program ---------------------------------------------------------------------------------------------


def program(*argv: str, cwd: Path | None = None, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "statewise"]), *argv]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("argv", [["--help"], ["census", "--help"], ["explain", "--help"], ["demo", "--help"], []])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom statewise.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    print('status', end.code)\n"
        "heavy = {'jax', 'flax', 'numpy', 'rich', 'optax', 'orbax'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy))\n"
    )
    done = program(*argv, code=code)
    assert done.stdout.splitlines()[-2:] == [f"status {0 if argv else 2}", "heavy []"]
    if not argv:
        assert done.stderr == "statewise: no command given (see statewise --help)\n"


def test_version() -> None:
    done = program("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("statewise ")


@pytest.mark.parametrize(
    "argv", [["bless"], ["census"], ["explain", "models:make"], ["census", "a:b", "--mesh"], ["demo", "--steps", "0"]]
)
def test_wrong_usage_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert err.startswith("statewise")


def test_as_a_program(here: Path) -> None:
    done = program("census", "models_of_user:make", "--json", cwd=here)
    assert done.returncode == 0
    assert json.loads(done.stdout)["total"]["leaves"] == 8, "what the user's module prints goes to standard error"
    assert "a factory may print" in done.stderr
    done = program("census", "models_of_user:mak", cwd=here)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("statewise: 'models_of_user' has no 'mak'")


def test_a_reader_that_has_enough_is_no_error(here: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "statewise", "plan", "models_of_user:make"]
    with subprocess.Popen(
        command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_in_a_terminal_the_table_is_drawn_by_rich(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert "─" in run("census", "models_of_user:make")[1]


def test_demo_passes_its_options_and_its_status_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from statewise.examples import demo

    seen = []

    def main_of_demo(settings: object = None, as_json: bool = False) -> int:
        seen.append((settings, as_json))
        if settings is None:
            raise AssertionError("a promise\ndoes not hold")
        return 0

    monkeypatch.setattr(demo, "main", main_of_demo)
    assert run("demo", "--steps", "5", "--json")[0] == 0
    assert seen == [(demo.Settings(steps=5), True)]
    status, _, err = run("demo")
    assert (status, err) == (1, "statewise: a promise does not hold\n")
