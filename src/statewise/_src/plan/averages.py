"""Averages, resolved: the shadow of each array of a kind, and how many updates it has seen.

`Average` is to an `EMA` what `OptimizerGroup` is to an optimizer: one for each kind that is averaged, so that a train
step which updates some of the kinds moves their averages alone.
"""

# No `from __future__ import annotations`: the base's fields are read at run time.
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Path
from statewise._src.plan.derived import WITHOUT_INTEGERS, Companions, Derived, DerivedLayout, check_no_loss, unfit
from statewise._src.plan.ema import EMA
from statewise._src.plan.kind import Kind, unknown_kind
from statewise._src.plan.optimizer_state import OPTIMIZER
from statewise.errors import DeclarationError

__all__ = ["Average", "averaged_kind", "check_averages"]

# Where the counts of a schedule stand among the averages: no kind can have this name.
COUNTS = "_counts"
_COUNT = ArraySpec((), jnp.dtype(jnp.int32))
_WARMUP = "sw.EMA(lambda n: jnp.minimum(0.999, (1 + n) / (10 + n)))"


@dataclasses.dataclass(frozen=True, eq=False)
class Average(Derived):
    """The averages of one kind under one name: an array for each of the kind's, then a count if there is a schedule.

    Attributes:
      ema: how they follow the kind.
    """

    ema: EMA

    mirrors: ClassVar[bool] = True

    @property
    def rule(self) -> EMA:
        """How they follow the kind."""
        return self.ema

    def companions(self) -> Companions:
        """Returns that each average may be packed as the array that it is of."""
        count = len(self.paths)
        return Companions((None,) * count, tuple((at,) for at in range(count)))

    @property
    def kind(self) -> str:
        """The kind that is averaged."""
        return self.kinds[0]

    @property
    def into(self) -> str:
        """The kind that the averages stand in."""
        return str(self.ema.name)

    @property
    def leaf_paths(self) -> tuple[Path, ...]:
        """The path of each: `ema/params/kernel`; of the count `ema/_counts/params`."""
        return tuple((self.into, *path) for path in self.layout.paths)

    @functools.cached_property
    def layout(self) -> DerivedLayout:
        """The shape of each array of the kind, in the dtype of its average."""
        found = [ArraySpec(spec.shape, self.ema.dtype_of(spec.dtype)) for _, specs, _ in self.rows for spec in specs]
        paths: list[Path] = [(self.kind, *path) for path in self.paths]
        if self.ema.schedule:
            found.append(_COUNT)
            paths.append((COUNTS, self.kind))
        # An average is placed as the leaf after the kind's name in its path; there is no leaf after a count's.
        roots = tuple(len(path) if path[0] == COUNTS else 1 for path in paths)
        return DerivedLayout(jax.tree.structure(found), tuple(paths), self.overridden or tuple(found), roots)

    def init(self, arrays: Sequence[Any]) -> list[Any]:
        """The averages at the start: copies of the values, and no update."""
        specs = self.layout.specs
        check_no_loss(self.leaf_paths, self.into, arrays, specs)
        copies = [jnp.array(array, dtype=spec.dtype) for array, spec in zip(arrays, specs, strict=False)]
        return [*copies, jnp.zeros(_COUNT.shape, _COUNT.dtype)] if self.ema.schedule else copies


def averaged_kind(path: Path) -> str:
    """Returns the kind that an average is of, from the path of its leaf: `ema/params/kernel`, `ema/_counts/params`."""
    return str(path[2] if path[1] == COUNTS else path[1])


def check_averages(
    kinds: Mapping[str, Kind], rows: Sequence[Any], averages: Mapping[Any, Any]
) -> tuple[dict[str, Kind], tuple[Average, ...]]:
    """Turns the averages as given into kinds of their own and the arrays in them, in the order given.

    Raises:
      DeclarationError: a kind that is not there, without leaves, frozen, or kept by the plan itself; leaves of no
        floating-point numbers; something that is no `EMA`; a name that is taken; a schedule that gives no number.
    """
    made: list[Average] = []
    taken: dict[str, Any] = {}
    declared = {}
    for key, given in averages.items():
        names = (key,) if isinstance(key, str) else tuple(key)
        several = given if isinstance(given, list | tuple) else (given,)
        for ema in several:
            if not isinstance(ema, EMA):
                raise DeclarationError(
                    f"The average of {key!r} is {_shown(ema)}, not an sw.EMA.",
                    kind=names[0] if names else None,
                    hint=f"averages={{{key!r}: sw.EMA(0.999)}}",
                )
            _check_name(ema, kinds, taken, key)
            taken[ema.name] = key
            declared[ema.name] = kinds[ema.name] if ema.name in kinds else Kind(EMA)
            _check_ema(ema)
        _check_kinds(names, kinds, rows)
        for ema in several:
            for name in names:
                mine = tuple((row.path, row.specs, row.structure) for row in rows if row.kind == name)
                made.append(Average((name,), mine, ema))
    return declared, tuple(made)


def _shown(given: Any) -> str:
    return repr(given) if isinstance(given, int | float | str) or given is EMA else type(given).__name__


def _check_name(ema: EMA, kinds: Mapping[str, Kind], taken: Mapping[str, Any], key: Any) -> None:
    another = f"sw.EMA(..., name={ema.name + '_slow'!r})"
    if ema.name in taken:
        joint = f"averages={{{_together(taken[ema.name], key)!r}: sw.EMA(...)}}  # one for both\nor {another}"
        raise DeclarationError(
            f"Two averages are called {ema.name!r}: under {taken[ema.name]!r} and under {key!r}.",
            kind=ema.name,
            hint=another if taken[ema.name] == key else joint,
        )
    if ema.name not in kinds:
        return
    kind = kinds[ema.name]
    if kind.of is EMA and (kind.frozen or kind.restart is not None or kind.batch_axis is not None):
        raise DeclarationError(
            f"The kind {ema.name!r} is of averages: they change in every update, begin as what they are of, "
            "and have no slots.",
            kind=ema.name,
            hint=f"{ema.name}=sw.Kind(sw.EMA, ...) without frozen, restart and batch_axis",
        )
    if kind.of is not EMA:
        raise DeclarationError(
            f"The average {ema.name!r} is called as a kind of the model is.",
            kind=ema.name,
            hint=another + f"\nto declare how averages live: {ema.name}=sw.Kind(sw.EMA, ...)",
        )


def _together(one: Any, other: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for key in (one, other) for name in (key if isinstance(key, tuple) else (key,))))


def _check_ema(ema: EMA) -> None:
    if ema.dtype is not None and jax.dtypes.canonicalize_dtype(ema.dtype) != ema.dtype:
        raise DeclarationError(
            f"The average {ema.name!r} cannot be {ema.dtype}: this process has no 64-bit numbers.",
            kind=ema.name,
            hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
        )
    if ema.schedule:
        try:
            decay: Any = jax.eval_shape(ema.schedule, jax.ShapeDtypeStruct(*_COUNT))
        except (TypeError, ValueError) as error:
            raise DeclarationError(
                f"The decay of the average {ema.name!r} is a schedule that cannot be asked: "
                f"{str(error).splitlines()[0]}",
                kind=ema.name,
                hint=_WARMUP,
            ) from error
        number = hasattr(decay, "dtype") and decay.shape == () and jnp.issubdtype(decay.dtype, jnp.floating)
        if not number:
            shown = f"{decay.dtype}{list(decay.shape)}" if hasattr(decay, "dtype") else type(decay).__name__
            raise DeclarationError(
                f"The decay of the average {ema.name!r} is a schedule that gives {shown}, not a number.",
                kind=ema.name,
                hint=_WARMUP,
            )


def _check_kinds(names: tuple[str, ...], kinds: Mapping[str, Kind], rows: Sequence[Any]) -> None:
    for name in names:
        if name not in kinds:
            raise unknown_kind(name, kinds)
        if name == OPTIMIZER or kinds[name].of is EMA:
            raise DeclarationError(
                f"The kind {name!r} cannot be averaged: it is of the training, not of the model.",
                kind=name,
                hint="averages={'params': sw.EMA(0.999)}",
            )
        if kinds[name].frozen:
            raise DeclarationError(
                f"The kind {name!r} is frozen: it would be its own average.",
                kind=name,
                hint=f"averages without {name!r}",
            )
    empty = [name for name in names if not any(row.kind == name and row.specs for row in rows)]
    if empty or not names:
        raise DeclarationError(
            f"An average is wanted of {', '.join(map(repr, empty)) or 'no kind'}, which has no leaf in this model.",
            kind=empty[0] if empty else None,
            hint="leave that average out, or correct the kind's filter",
        )
    odd = unfit([row for row in rows if row.kind in names], "has no average")
    if odd:
        raise DeclarationError(
            f"The average of {', '.join(names)} would be of leaves that are not made of floating-point numbers.",
            leaves=odd,
            kind=names[0],
            hint=WITHOUT_INTEGERS,
        )
