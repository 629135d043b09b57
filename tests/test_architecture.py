"""The rules that keep the code one piece: which package imports which, what it may reach for, how large it grows.

All but the public names are read from the source by `ast`, so that a rule holds for code that no test runs.
"""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from beartype.roar import BeartypeCallHintParamViolation

from source_tree import ROOT, SOURCE, dotted, imported, name_of, parse, sources

NAMES = ROOT / "tests" / "public_names.txt"

# A package of `_src` imports only itself and those before it, wherever in a file the import is.
PACKAGES = (
    "common",
    "names",
    "filters",
    "plan",
    "sharding",
    "core",
    "step",
    "inspect",
    "checkpoint",
    "report",
    "cli",
)
# What is public beside `__init__`.  `errors` imports nothing of ours; the others, and `cli`, import anything.
PUBLIC_MODULES = ("errors", "results", "testing", "__init__", "examples", "__main__")

# An import inside a function is for a package that need not be installed, or for the command line, where `--help` must
# not wait for JAX.
OPTIONAL = ("einops", "safetensors")
COMMAND_LINE = ("cli", "examples")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # its docstring not counted: a full example is no reason to split a function
# "file" or "file:function" -> why it may be longer.
LONGER: dict[str, str] = {
    "src/statewise/_src/core/plan.py": "Kinds, Plan and State name each other in their signatures; most is docstrings",
}

# Packages whose private side is not ours to touch, and whose versions only common/compat tells apart.
FOREIGN = {"jax", "jaxlib", "flax", "nnx", "optax", "orbax", "ocp", "tensorstore", "ts", "numpy"}
# The only folder that knows the libraries which write arrays; and their classes that it subclasses, each made for that.
STORAGE = "src/statewise/_src/checkpoint/orbax/"
OF_STORAGE = ("orbax", "tensorstore", "etils")
EXTENDED = {"ocp.AsyncCheckpointHandler", "ocp.args.CheckpointArgs", "ocp.v1.CheckpointableHandler"}
# Seams of NNX that are private in all but name, or that Flax is about to retire.
FORBIDDEN_MODULES = ("jax._src", "flax.nnx.graphlib", "flax.nnx.graph", "flax.nnx.extract", "flax.core.scope")
FORBIDDEN_NAMES = {"_raw_value", "StateAxes", "DiffState", "StateSharding", "graphlib", "extract"}


def package_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).parts
    if parts[0] != "_src":
        return parts[0].removesuffix(".py")
    return parts[1] if len(parts) > 2 else "_src"


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Yields (module of ours, line): lazy imports and those for type checkers too."""
    for module, name, line in imported(file):
        full = f"{module}.{name}" if name else module
        if full in known:
            yield full, line
        elif module in known and module != "statewise":
            yield module, line


def test_every_module_is_in_a_known_package() -> None:
    known = {*PACKAGES, *PUBLIC_MODULES, "_src"}
    assert {package_of(file) for file in sources()} <= known, "a new package goes into PACKAGES, where the arrow has it"


def test_a_package_imports_only_from_packages_before_it() -> None:
    known = {module_of(file): file for file in sources()}
    place = {package: number for number, package in enumerate(("errors", *PACKAGES, *PUBLIC_MODULES[1:]))}
    wrong = []
    for file in sources():
        here = package_of(file)
        for module, line in modules_imported(file, known):
            there = package_of(known[module])
            if here != "cli" and place.get(there, len(place)) > place.get(here, -1):
                wrong.append(f"{name_of(file)}:{line}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = {module_of(file): file for file in sources()}
    graph = {
        module: {imported for imported, _ in modules_imported(file, known)} - {module} for module, file in known.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_inside_functions_are_of_optional_packages() -> None:
    wrong = []
    for file in sources():
        if package_of(file) in COMMAND_LINE:
            continue
        functions = (node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        wrong += sorted(
            {
                f"{name_of(file)}:{line}: imports {module}"
                for function in functions
                for module, _, line in imported(file, function)
                if module.split(".")[0] not in OPTIONAL
            }
        )
    assert not wrong, "\n".join(wrong)


# Methods of named tuples, which are public in all but name.
NAMED_TUPLE = {"_replace", "_fields", "_asdict", "_make"}


def defined_in(tree: ast.Module) -> set[str]:
    """Every name that a file gives to an attribute, a function, a class or a variable."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # __slots__, object.__setattr__
    return names


def test_no_file_reads_a_private_attribute_of_another() -> None:
    wrong = []
    for file in sources():
        tree = parse(file)
        own = defined_in(tree) | NAMED_TUPLE | {"_src"}
        wrong += [
            f"{name_of(file)}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr) and node.attr not in own
        ]
    assert not wrong, "\n".join(wrong)


def test_the_list_of_public_names_is_read_and_not_repeated() -> None:
    """`__init__.pyi` is the one list: `__init__.py` names nothing that is in it, and imports nothing heavy."""
    listed = {
        alias.name: node.module
        for node in parse(SOURCE / "__init__.pyi").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    text = (SOURCE / "__init__.py").read_text(encoding="utf-8")
    repeated = [name for name in listed if re.search(rf"\b{name}\b", text)]
    assert repeated == [], repeated
    assert {module for module, _, _ in imported(SOURCE / "__init__.py")} <= {"ast", "importlib", "os", "typing"}
    check = "import sys, statewise; assert not {'jax', 'flax', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=SOURCE.parent, timeout=60)


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


def test_only_one_folder_knows_orbax_and_tensorstore() -> None:
    wrong = [
        f"{name_of(file)}:{line}: imports {module}"
        for file in sources()
        for module, _, line in imported(file)
        if module.split(".")[0] in OF_STORAGE and not name_of(file).startswith(STORAGE)
    ]
    assert not wrong, "\n".join(wrong)


def test_of_orbax_only_what_is_made_for_it_is_subclassed() -> None:
    wrong, subclassed = [], set()
    for file in sources():
        for node in ast.walk(parse(file)):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                of = dotted(base.value if isinstance(base, ast.Subscript) else base)
                if of.split(".")[0] in ("ocp", "ts"):
                    subclassed.add(of)
            if isinstance(node, ast.Attribute) and dotted(node).startswith("ocp.type_handlers"):
                wrong.append(f"{name_of(file)}:{node.lineno}: {dotted(node)} is Orbax's inside")
    assert not wrong, "\n".join(wrong)
    assert subclassed == EXTENDED


def test_versions_are_told_apart_in_one_place() -> None:
    wrong = []
    for file in sources():
        if file.parent.name == "compat":
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


def test_a_package_that_lists_its_files_lists_all_of_them() -> None:
    wrong = []
    for init in SOURCE.rglob("__init__.py"):
        text = ast.get_docstring(parse(init)) or ""
        if "The files" in text:
            files = sorted(file.stem for file in init.parent.glob("*.py") if file != init)
            wrong += [f"{name_of(init)}: no `{file}`" for file in files if f"`{file}`" not in text]
    assert not wrong, "\n".join(wrong)


def public_names() -> list[str]:
    import statewise

    return sorted(statewise.__all__)


def test_the_public_names_are_these() -> None:
    expected = NAMES.read_text(encoding="utf-8").split()
    assert public_names() == expected, f"a change of the public names is a change of {name_of(NAMES)}, reviewed as one"


def test_completion_offers_the_public_names_and_nothing_else() -> None:
    import statewise

    shown = [name for name in dir(statewise) if not name.startswith("_")]
    assert shown == sorted([*public_names(), "errors", "results", "testing"])


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
