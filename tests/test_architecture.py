"""The rules that keep the code one piece: which room imports which, what it may reach for, how large it grows.

All but the public names are read from the source by `ast`, so that a rule holds for code that no test runs.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from beartype.roar import BeartypeCallHintParamViolation

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "statewise"
NAMES = ROOT / "tests" / "public_names.txt"

# A room imports only from rooms before it.  `__init__` is the public face (`import statewise as sw`): it exports
# what stands before it, and only what stands after it may use it.  A folder is one room.
ROOMS = (
    "errors",
    "_face",
    "_compat",
    "paths",
    "filters",
    "scan",
    "narrowing",
    "putting",
    "placements",
    "averages",
    "fresh",
    "kinds",
    "naming",
    "tables",
    "aliases",
    "spelled",
    "claims",
    "grafting",
    "rows",
    "derived",
    "moments",
    "shadows",
    "elementwise",
    "packing",
    "copies",
    "members",
    "layout",
    "intern",
    "variants",
    "plan",
    "batches",
    "select",
    "census",
    "lies",
    "meshes",
    "members_placed",
    "explicit",
    "annotations",
    "placement",
    "memory",
    "views",
    "places",
    "state",
    "planned",
    "inside",
    "using",
    "casting",
    "folding",
    "axes",
    "stacking",
    "chosen",
    "slots",
    "following",
    "restart",
    "exchange",
    "moving",
    "counterparts",
    "carrying",
    "transfer",
    "effects",
    "dependence",
    "excluded",
    "varying",
    "capture",
    "changes",
    "arguments",
    "closures",
    "functions",
    "passed",
    "outside",
    "tracing",
    "contracts",
    "routes",
    "cautions",
    "updates",
    "averaging",
    "programs",
    "perdevice",
    "dispatch",
    "lowered",
    "steps",
    "decorators",
    "stacked",
    "layers",
    "leftbehind",
    "grads",
    "audit",
    "watch",
    "lint",
    "checkpoint",
    "report",
    "testing",
    "__init__",
    "examples",
    "cli",
    "__main__",
)

# A method that is only the way on (`kinds.plan(model)`, `plan.take(model)`) imports the next room when it is called.
# Its annotations name that room in full under TYPE_CHECKING (`import statewise._src.core.plan`; `->
# statewise._src.core.plan.Plan`), which the run-time type checker can follow.  No other import goes against the flow.
FORWARDS = {
    ("kinds", "plan"),
    ("members", "stacking"),
    ("variants", "plan"),
    ("variants", "stacking"),
    ("variants", "state"),
    ("plan", "state"),
    ("plan", "placement"),
    ("plan", "exchange"),
    ("plan", "axes"),
    ("state", "restart"),
    ("state", "casting"),
    ("state", "folding"),
    ("state", "using"),
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # its docstring not counted: a full example is no reason to split a function
# "file" or "file:function" -> why it may be longer.
LONGER: dict[str, str] = {}

# Packages whose private side is not ours to touch, and whose versions only _compat tells apart.
FOREIGN = {"jax", "jaxlib", "flax", "nnx", "optax", "orbax", "ocp", "numpy"}
# Seams of NNX that are private in all but name, or that Flax is about to retire.
FORBIDDEN_MODULES = ("jax._src", "flax.nnx.graphlib", "flax.nnx.graph", "flax.nnx.extract", "flax.core.scope")
FORBIDDEN_NAMES = {"_raw_value", "StateAxes", "DiffState", "StateSharding", "graphlib", "extract"}


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported(file: Path, tree: ast.AST | None = None) -> Iterator[tuple[str, str | None, int]]:
    """Yields (module, name or None, line) for every import of a file, wherever it stands, relative ones resolved."""
    package = ("statewise", *file.relative_to(SOURCE).parent.parts)
    for node in ast.walk(tree or parse(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((module, alias.name, node.lineno) for alias in node.names)


def dotted(node: ast.AST) -> str:
    """Writes an attribute chain: `nnx.graphlib.flatten`; empty for anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def is_room(name: str) -> bool:
    return (SOURCE / f"{name}.py").exists() or (SOURCE / name / "__init__.py").exists()


def is_typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")


def deferred_lines(file: Path) -> set[int]:
    """The lines of the imports that do not run when the module is imported."""
    lazy = ast.FunctionDef | ast.AsyncFunctionDef
    inside = (node for node in ast.walk(parse(file)) if isinstance(node, lazy) or is_typing_only(node))
    return {line for node in inside for _, _, line in imported(file, node)}


def rooms_imported(file: Path) -> Iterator[tuple[str, int]]:
    for module, name, line in imported(file):
        parts = module.split(".")
        if parts[0] != "statewise":
            continue
        if len(parts) > 1:
            yield parts[1], line
        else:
            yield (name if name and is_room(name) else "__init__"), line


def test_every_module_is_in_a_known_room() -> None:
    assert {room_of(file) for file in sources()} <= set(ROOMS), "add the new room to ROOMS, where the flow has it"


def test_a_room_imports_only_from_rooms_before_it() -> None:
    place = {room: number for number, room in enumerate(ROOMS)}
    wrong = []
    for file in sources():
        here, deferred = room_of(file), deferred_lines(file)
        for room, line in rooms_imported(file):
            forwards = (here, room) in FORWARDS and line in deferred
            if room != here and not forwards and place.get(room, len(place)) >= place.get(here, -1):
                wrong.append(f"{name_of(file)}:{line}: {here} imports {room}")
    assert not wrong, "\n".join(wrong)


def test_the_public_face_holds_no_logic() -> None:
    """Imports and `__all__`; where imports are deferred, the usual `__getattr__` and `__dir__` and their table."""
    wrong = []
    for node in parse(SOURCE / "__init__.py").body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        imports = isinstance(node, ast.Import | ast.ImportFrom)
        constant = isinstance(node, ast.Assign | ast.AnnAssign) and not any(
            isinstance(inner, ast.Lambda) for inner in ast.walk(node)
        )
        typing_only = is_typing_only(node) and all(isinstance(it, ast.Import | ast.ImportFrom) for it in node.body)
        deferred = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
        if not (docstring or imports or constant or typing_only or deferred):
            wrong.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


def forbidden(file: Path) -> Iterator[str]:
    for module, name, line in imported(file):
        full = f"{module}.{name}" if name else module
        private = full.split(".")[0] in FOREIGN and any(re.match(r"_(?!_)", part) for part in full.split("."))
        if private or full.startswith(FORBIDDEN_MODULES) or (module.startswith("flax") and name in FORBIDDEN_NAMES):
            yield f"{name_of(file)}:{line}: imports {full}"
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Attribute):
            of = dotted(node)
            foreign = of.split(".")[0] in FOREIGN
            private = foreign and re.match(r"_(?!_)", node.attr)
            if private or node.attr == "_raw_value" or (foreign and node.attr in FORBIDDEN_NAMES):
                yield f"{name_of(file)}:{node.lineno}: uses {of or node.attr}"
            elif node.attr.startswith("_graph_"):
                yield f"{name_of(file)}:{node.lineno}: uses {node.attr}"


def test_no_private_seam_of_jax_or_flax() -> None:
    wrong = [line for file in sources() for line in forbidden(file)]
    # In text too: a name built for getattr or importlib is an import all the same.
    seam = re.compile(r"jax\._src|\b_raw_value\b|flax\.nnx\.(graph|graphlib|extract)\b|orbax\..*\._src")
    wrong += [
        f"{name_of(file)}:{number}: {line.strip()}"
        for file in sources()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if seam.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_versions_are_told_apart_in_one_place() -> None:
    wrong = []
    for file in sources():
        if room_of(file) == "_compat":
            continue
        wrong += [
            f"{name_of(file)}:{line}: imports {module}"
            for module, _, line in imported(file)
            if module.startswith(("importlib.metadata", "packaging"))
        ]
        for node in ast.walk(parse(file)):
            probes = isinstance(node, ast.Call) and dotted(node.func) == "hasattr" and node.args
            probed = dotted(node.args[0]).split(".")[0] in FOREIGN if probes else False
            version = isinstance(node, ast.Attribute) and node.attr in (
                "__version__",
                "__version_info__",
                "version_info",
            )
            if probed or version:
                wrong.append(f"{name_of(file)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields (name, lines without docstring) of every function and method."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for folder in ("src", "tests", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            lines = len(file.read_text(encoding="utf-8").splitlines())
            if lines > MAX_FILE_LINES and name_of(file) not in LONGER:
                wrong.append(f"{name_of(file)}: {lines} lines, more than {MAX_FILE_LINES}")
            wrong += [
                f"{name_of(file)}:{name}: {lines} lines, more than {MAX_FUNCTION_LINES}"
                for name, lines in functions(parse(file))
                if lines > MAX_FUNCTION_LINES and f"{name_of(file)}:{name}" not in LONGER
            ]
    assert not wrong, "\n".join(wrong)


def public_names() -> list[str]:
    import statewise

    return sorted(statewise.__all__)


def test_the_public_names_are_these() -> None:
    expected = NAMES.read_text(encoding="utf-8").split()
    assert public_names() == expected, f"a change of the public names is a change of {name_of(NAMES)}, reviewed as one"


def test_every_public_name_is_there_and_documented_with_an_example() -> None:
    import statewise

    wrong = []
    for name in public_names():
        thing = getattr(statewise, name)
        if name.startswith("__"):
            continue
        if ">>>" not in (thing.__doc__ or ""):
            wrong.append(f"{name}: no example (>>>) in its docstring")
    assert not wrong, "\n".join(wrong)


def test_annotations_are_checked_while_tests_run() -> None:
    from statewise.errors import StatewiseError

    with pytest.raises(BeartypeCallHintParamViolation, match="kind"):
        StatewiseError("a fact", kind=3)


def text_files() -> Iterator[tuple[Path, str]]:
    """Yields what belongs to the repository: tracked files, and new ones that git does not ignore."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no telling the repository's files from others")
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in (ROOT / name for name in sorted(set(listed.split("\0"))) if name):
        if file.is_file() and b"\0" not in (data := file.read_bytes()):
            yield file, data.decode("utf-8")


def test_the_repository_names_no_machine_and_no_package_host() -> None:
    # Each has one letter in brackets, so that this file does not name what it looks for.
    paths = r"/[w]ork/|/[r]oot/|/[h]ome/|/[U]sers/|/[t]mp/v"
    hosts = r"[p]ypi\.org|[p]ythonhosted\.org|[d]ebian\.org|[n]pmjs\.|[a]naconda\.org|[i]ndex-url"
    named = re.compile(f"{paths}|{hosts}")
    wrong = [
        f"{name_of(file)}:{number}: {line.strip()[:120]}"
        for file, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if named.search(line)
    ]
    assert not wrong, "\n".join(wrong)
