"""Where the package touches JAX: a short list of public names, and one package for all that is less than stable.

Jaxprs, tracers, trace state, `jax.core`, `jax.extend`, `jax.interpreters` and `jax.experimental` stand in
`common/compat` only; no file uses a name that the installed JAX, Flax or Optax lists as deprecated.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import flax
import jax
import optax
import pytest
from jax.extend.core import primitives as jax_primitives

from source_tree import SOURCE, dotted, full_names, name_of, parse, sources
from statewise._src.common.compat import primitives

COMPAT = SOURCE / "_src" / "common" / "compat"
OTHERS = [file for file in sources() if COMPAT not in file.parents]

# Everything that the package uses of `jax` outside of common/compat.  A name is added here by hand: is it documented,
# and will it stay?
_NAMES = """
    Array Device NamedSharding P Ref ShapeDtypeStruct block_until_ready checkpoint config custom_vjp default_backend
    default_device device_count device_get device_put disable_jit distributed dtypes ensure_compile_time_eval
    eval_shape grad jacfwd jacrev jit lax make_array_from_callback make_array_from_single_device_arrays make_jaxpr
    make_mesh new_ref nn numpy process_count process_index random reshard sharding shard_map stages transfer_guard
    tree tree_util typeof typing value_and_grad vjp vmap
"""
ALLOWED = frozenset(_NAMES.split())
# Parts of a jaxpr under a name that has changed, or may: `compat.jaxprs` has a function for each.  What JAX's grammar
# of jaxprs has (`eqns`, `invars`, `outvars`, `constvars`, `effects`, an `aval`, a literal's `val`) is read anywhere.
PARTS = {"primitive", "multiple_results", "in_avals", "out_avals", "inner_aval"}
# These are parts of an equation, or of a closed jaxpr, only where the value is one; `effects` is ours.
PARTS_OF = {"params": r"eqn|equation", "jaxpr": r"closed|jaxpr|body|inner", "consts": r"closed|jaxpr|body|inner"}
PRIMITIVES = {value.name for name, value in vars(jax_primitives).items() if name.endswith("_p")}


def seams(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (what, line) for each use of JAX that belongs into common/compat."""
    names = list(full_names(tree))
    for name, line in names:
        first, *rest = name.split(".")
        if first == "jaxlib" or (first == "jax" and rest and rest[0] not in ALLOWED):
            yield name, line
    reads_jaxprs = any("compat.jaxprs" in name or "compat.primitives" in name for name, _ in names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = PARTS_OF.get(node.attr)
            base = dotted(node.value).split(".")[-1]
            if node.attr in PARTS or (of is not None and re.fullmatch(of, base)):
                yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = re.fullmatch(r"jax(lib)?(\.\w+)*", node.value) and node.value.split(".")[1:2]
            if module and module[0] not in ALLOWED:
                yield repr(node.value), node.lineno
            elif reads_jaxprs and node.value in vocabulary():
                yield f"{node.value!r}, a primitive", node.lineno


@functools.cache
def vocabulary() -> set[str]:
    """Returns the names of JAX's primitives, and ours of other versions."""
    ours = (getattr(primitives, name) for name in primitives.__all__)
    return PRIMITIVES.union(*({value} if isinstance(value, str) else value for value in ours if not callable(value)))


def listed(found: Iterator[tuple[str, int]], file: Path) -> list[str]:
    return [f"{name_of(file)}:{line}: {what}" for what, line in sorted(set(found), key=lambda pair: pair[::-1])]


def test_only_compat_touches_what_jax_may_change() -> None:
    wrong = [line for file in OTHERS for line in listed(seams(parse(file)), file)]
    assert not wrong, "\n".join(wrong)


def test_every_allowed_name_is_used_and_public() -> None:
    used = {name.split(".")[1] for file in OTHERS for name, _ in full_names(parse(file)) if name.startswith("jax.")}
    assert used == ALLOWED, used ^ ALLOWED
    assert not [name for name in ALLOWED if not hasattr(jax, name)]


@pytest.mark.parametrize(
    "code",
    [
        "import jax.core",
        "import jax.extend.core as jc",
        "from jax import core",
        "from jax.interpreters import partial_eval",
        "from jax.experimental.shard_map import shard_map",
        "import jaxlib",
        "import jax\nisinstance(x, jax.core.Tracer)",
        "import jax as j\nj.extend.core.Literal",
        "import jax\ngetattr(jax, 'core')",
        "import importlib\nimportlib.import_module('jax.extend.core')",
        "for eqn in jaxpr.eqns:\n    eqn.primitive",
        "eqn.params['jaxpr']",
        "closed.jaxpr",
        "closed.in_avals",
        "hasattr(var.aval, 'inner_aval') or var.aval.inner_aval",
        "from statewise._src.common.compat import jaxprs\njaxprs.name_of(eqn) == 'scan'",
        "from statewise._src.common.compat import primitives\nname in ('pjit', 'add')",
    ],
)
def test_a_seam_is_seen(code: str) -> None:
    assert list(seams(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import jax\nimport jax.numpy as jnp\njax.Array, jax.tree.leaves, jnp.add, jax.sharding.Mesh",
        "traced.effects.jaxpr, effects.consts, group.params(), self.jaxpr, 'scan'",
        "from statewise._src.common.compat import jaxprs\njaxprs.scan_of(eqn).body, jaxpr.eqns[0].invars[0].aval",
    ],
)
def test_what_is_allowed_is_no_seam(code: str) -> None:
    assert list(seams(ast.parse(code))) == []


# --- deprecated names -------------------------------------------------------------------------------------------


def modules_of(package: object, text: str) -> Iterator[tuple[str, Path]]:
    """Yields (module, file) for the public modules of a package whose source contains a text."""
    root = Path(inspect.getfile(package)).parent
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        # Pallas takes seconds to import, and its names are reached by its own modules only.
        public = not any(part.startswith("_") for part in module.split(".")) and "pallas" not in parts
        if public and text in file.read_text(encoding="utf-8"):
            yield module, file


@functools.cache
def deprecations() -> dict[str, str]:
    """Returns the deprecated names of JAX and Optax, with their notes: both keep a dictionary on each module."""
    names = {}
    for module, _ in itertools.chain(modules_of(jax, "_deprecations = {"), modules_of(optax, "_deprecations = {")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a whole module may be deprecated
            listing = vars(importlib.import_module(module))["_deprecations"]
        names |= {f"{module}.{name}": note[0] for name, note in listing.items()}
    return names


def warns(node: ast.AST) -> bool:
    """Returns whether a statement warns of a deprecation whenever it is reached."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and dotted(call.func).endswith("warn") and "DeprecationWarning" in ast.dump(call)


@functools.cache
def deprecated_in_flax() -> dict[str, tuple[str, str]]:
    """Returns what Flax deprecates: (module, qualified name), by `module.name`.

    Flax keeps no list.  A function is deprecated if it warns whatever its arguments are, or is wrapped by `deprecated`;
    a class, if its `__init__` does; a name, if a module's `__getattr__` compares with it and warns.
    """
    names: dict[str, tuple[str, str]] = {}
    for module, file in modules_of(flax, "eprecat"):
        tree = parse(file)
        owners = [("", tree), *((node.name, node) for node in tree.body if isinstance(node, ast.ClassDef))]
        for owner, body in owners:
            for node in body.body:
                if not isinstance(node, ast.FunctionDef):
                    continue
                is_wrapped = any("deprecated" in dotted(decorator) for decorator in node.decorator_list)
                if any(map(warns, node.body)) or is_wrapped:
                    qualified = owner if node.name == "__init__" else f"{owner}.{node.name}".lstrip(".")
                    names[f"{module}.{qualified}"] = module, qualified
        names |= {f"{module}.{name}": (module, name) for name in asked_for(tree)}
        names |= {
            f"{module}.{dotted(node.targets[0])}": (module, dotted(node.targets[0]))
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and dotted(node.value.func).split(".")[-1] == "deprecated"
        }
    return names


def asked_for(tree: ast.Module) -> Iterator[str]:
    """Yields the names for which a module's `__getattr__` warns."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == "__getattr__":
            branches = (node for node in ast.walk(function) if isinstance(node, ast.If) and any(map(warns, node.body)))
            for branch in branches:
                yield from (node.value for node in ast.walk(branch.test) if isinstance(node, ast.Constant))


def resolved(name: str) -> tuple[str, str] | None:
    """Returns (module, qualified name) of what a full name stands for, however it is re-exported; None for a value."""
    parts = name.split(".")
    thing: object = None
    for count, part in enumerate(parts):
        module = ".".join(parts[: count + 1])
        if thing is None or inspect.ismodule(thing):
            try:
                thing = importlib.import_module(module)
                continue
            except ModuleNotFoundError:
                pass
        # Not `getattr`: it would call a module's `__getattr__`, and a property.
        thing = inspect.getattr_static(thing, part, None)
        if thing is None:
            return ".".join(parts[:count]), ".".join(parts[count:])
    thing = getattr(thing, "fget", None) or getattr(thing, "__func__", None) or thing
    module, qualified = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    return (module, qualified) if isinstance(module, str) and isinstance(qualified, str) else None


def deprecated(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields (name and note, line) for each deprecated name of JAX, Optax or Flax that a file uses."""
    listing, of_flax = deprecations(), set(deprecated_in_flax().values())
    for name, line in full_names(tree):
        parts = name.split(".")
        prefixes = [".".join(parts[: count + 1]) for count in range(len(parts))]
        yield from ((f"{prefix}: {listing[prefix]}", line) for prefix in prefixes if prefix in listing)
        if parts[0] == "flax" and (of_flax & {resolved(prefix) for prefix in prefixes}):
            yield f"{name}: deprecated by Flax", line


def test_no_deprecated_name_of_jax_flax_or_optax() -> None:
    wrong = [line for file in sources() for line in listed(deprecated(parse(file)), file)]
    assert not wrong, "\n".join(wrong)


def test_the_lists_of_deprecated_names_are_found() -> None:
    names = deprecations()
    assert {name.rpartition(".")[0] for name in names} >= {"jax", "jax.core", "jax.interpreters.pxla", "optax"}
    of_flax = set(deprecated_in_flax())
    assert of_flax >= {
        "flax.nnx.VariableState",
        "flax.nnx.statelib.State.filter",
        "flax.nnx.variablelib.Variable.value",
    }


def test_a_deprecated_name_is_seen_however_it_is_reached() -> None:
    """Each name on the installed lists is planted in five ways: none depends on a version's own names."""
    for name in deprecations():
        module, _, last = name.rpartition(".")
        for code in (
            f"import {module}\n{name}",
            f"import {module} as m\nm.{last}(1)",
            f"from {module} import {last} as other",
            f"import {module} as m\ngetattr(m, {last!r})",
        ):
            assert name in {what.partition(":")[0] for what, _ in deprecated(ast.parse(code))}, code
    assert not list(deprecated(ast.parse("import jax, optax\njax.device_put, optax.sgd, jax.numpy.add")))


@pytest.mark.parametrize(
    "code",
    [
        "from flax import nnx\nnnx.VariableState",
        "from flax.nnx import VariableState",
        "from flax import nnx\nnnx.State.filter(state, 'a')",
        "from flax import nnx\nnnx.Module.iter_modules",
        "from flax.nnx import variablelib\nvariablelib.Variable.raw_value",
    ],
)
def test_a_deprecated_name_of_flax_is_seen(code: str) -> None:
    assert list(deprecated(ast.parse(code)))
    assert not list(deprecated(ast.parse("from flax import nnx\nnnx.iter_modules, nnx.Variable.get_value, nnx.State")))
