"""What lint reads from bytecode: on every Python the same, of functions in any dress, and nothing that must be run."""

from __future__ import annotations

import functools
from typing import Any

import jax
import pytest
from flax import nnx

from statewise._src.inspect.lint.class_code import Call, functions_of

WANTED = ("sow", "perturb", nnx.pop)


def calls_of(cls: type) -> list[Call]:
    return [call for code in functions_of(cls, WANTED) for call in code.calls]


def kept(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


def classes() -> dict[str, type]:
    inside, later = nnx.Intermediate, None
    del later

    class Plain:
        def __call__(self, x: Any) -> None:
            self.sow(nnx.Intermediate, "seen", x)  # type: ignore[attr-defined]

    class ByName:
        def __call__(self, x: Any) -> None:
            self.sow(variable_type=nnx.Intermediate, name="seen", value=x)  # type: ignore[attr-defined]

    class Closure:
        def __call__(self, x: Any) -> Any:
            return [(lambda value: self.sow(inside, "seen", value))(each) for each in x]  # type: ignore[attr-defined]

    class Decorated:
        @kept
        @kept
        def __call__(self, x: Any) -> None:
            self.sow(nnx.Intermediate, "seen", x)

    class Jitted:
        @jax.jit
        def __call__(self, x: Any) -> None:
            self.sow(nnx.Intermediate, "seen", x)  # type: ignore[attr-defined]

    class Static:
        @staticmethod
        def record(module: Any, x: Any) -> None:
            module.sow(nnx.Intermediate, "seen", x)

    class Class:
        @classmethod
        def record(cls, module: Any, x: Any) -> None:
            module.sow(nnx.Intermediate, "seen", x)

    class Property:
        @property
        def out(self) -> None:
            self.sow(nnx.Intermediate, "seen", 1)  # type: ignore[attr-defined]

    class Derived(Plain):
        pass

    return {cls.__name__: cls for cls in (Plain, ByName, Closure, Decorated, Jitted, Static, Class, Property, Derived)}


@pytest.mark.parametrize("cls", classes().values(), ids=classes())
def test_a_call_is_read_in_any_dress(cls: type) -> None:
    assert calls_of(cls) == [Call("sow", nnx.Intermediate, "seen")]


class Others:
    """Calls whose arguments are unknown before they run, or are of another kind."""

    kept: Any = None

    def computed(self, name: str, type_: Any) -> None:
        self.sow(nnx.Intermediate, name.upper(), 1)  # type: ignore[attr-defined]
        self.sow(type_, "typed", 1)  # type: ignore[attr-defined]
        self.sow("intermediates", "tagged", 1)  # type: ignore[attr-defined]
        self.perturb("grad", 1)  # type: ignore[attr-defined]

    def pops(self, options: dict[str, Any]) -> None:
        options.pop("seen")
        nnx.pop(self, nnx.Cache)
        self.kept.pop(nnx.Intermediate)

    def decides(self) -> None:
        self.sow(nnx.Intermediate, "seen", 1, capture_noop=False)  # type: ignore[attr-defined]


def test_what_is_computed_is_unknown() -> None:
    codes = {code.name.rpartition(".")[2]: code for code in functions_of(Others, WANTED)}
    assert codes["computed"].calls == (
        Call("sow", nnx.Intermediate, None),
        Call("sow", None, "typed"),
        Call("sow", None, "tagged"),
        Call("perturb", None, "grad"),
    )
    assert codes["pops"].calls == (Call("pop", nnx.Cache, None),)
    assert nnx.pop in codes["pops"].objects
    assert "capture_noop" in codes["decides"].texts
    assert "capture_noop" not in codes["computed"].texts | codes["pops"].texts


class Raising:
    """A class whose attributes must not be touched more than needed."""

    def __get__(self, *args: Any) -> Any:
        raise RuntimeError("run")

    def __call__(self) -> None:
        self.sow(nnx.Intermediate, "seen", 1)  # type: ignore[attr-defined]


class Circle:
    def __call__(self) -> None: ...

    @property
    def __wrapped__(self) -> Any:
        return self


class Holder:
    raising, circle, missing = Raising(), Circle(), print

    def unbound(self) -> Any:
        return unknown_global  # type: ignore[name-defined]  # noqa: F821


def test_nothing_is_run() -> None:
    names = [code.name for code in functions_of(Holder, WANTED)]
    assert names == ["Holder.unbound"]
