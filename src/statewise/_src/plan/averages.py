"""Averages, resolved: the average of each array of a kind, and how many updates it has seen.

`Average` is to an `EMA` what `OptimizerGroup` is to an optimizer: one for each kind that is averaged, so that a train
step which updates some of the kinds updates their averages alone.
"""

# No `from __future__ import annotations`: the fields of the base class are read at run time.
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from statewise._src.common.nnx_graph import ArraySpec
from statewise._src.common.paths import Path
from statewise._src.plan.derived import Companions, Derived, DerivedLayout, check_no_loss, sources_of
from statewise._src.plan.ema import EMA
from statewise._src.plan.kind import Kind
from statewise._src.plan.leaf_specs import LeafSpec
from statewise._src.plan.optimizer_state import OPTIMIZER
from statewise.errors import DeclarationError

__all__ = ["Average", "averaged_kind", "resolve_averages"]

# The first key, after the name, of the path of a schedule's count: no kind can have this name.
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
        """Returns how the averages follow the kind."""
        return self.ema

    def companions(self) -> Companions:
        """Returns that each average may be packed in the order of the array that it averages."""
        count = len(self.paths)
        return Companions((None,) * count, tuple((index,) for index in range(count)))

    @property
    def kind(self) -> str:
        """Returns the kind that is averaged."""
        return self.kinds[0]

    @property
    def into(self) -> str:
        """Returns the kind that the averages belong to."""
        return str(self.ema.name)

    @property
    def leaf_paths(self) -> tuple[Path, ...]:
        """Returns the path of each average, `ema/params/kernel`, and of the count, `ema/_counts/params`."""
        return tuple((self.into, *path) for path in self.layout.paths)

    @functools.cached_property
    def layout(self) -> DerivedLayout:
        """Returns the shape of each array of the kind, in the dtype of its average; then that of the count."""
        specs = [ArraySpec(spec.shape, self.ema.dtype_of(spec.dtype)) for spec in self.source_specs]
        paths: list[Path] = [(self.kind, *path) for path in self.paths]
        # An average is placed like the leaf at its path without the kind's name; a count belongs to no leaf.
        roots = [1] * len(paths)
        if self.ema.schedule:
            specs.append(_COUNT)
            paths.append((COUNTS, self.kind))
            roots.append(2)
        return DerivedLayout(jax.tree.structure(specs), tuple(paths), self.overridden or tuple(specs), tuple(roots))

    def init(self, arrays: Sequence[Any]) -> list[Any]:
        """Returns the averages before the first update: copies of the values, and a count of 0."""
        specs = self.layout.specs
        check_no_loss(self.leaf_paths, self.into, arrays, specs)
        copies = [jnp.array(array, dtype=spec.dtype) for array, spec in zip(arrays, specs, strict=False)]
        return [*copies, jnp.zeros(_COUNT.shape, _COUNT.dtype)] if self.ema.schedule else copies


def averaged_kind(path: Path) -> str:
    """Returns the kind that an average tracks, from the path of its leaf: `ema/params/kernel`, `ema/_counts/params`."""
    return str(path[2] if path[1] == COUNTS else path[1])


def resolve_averages(
    kinds: Mapping[str, Kind], rows: Sequence[LeafSpec], averages: Mapping[Any, Any]
) -> tuple[dict[str, Kind], tuple[Average, ...]]:
    """Resolves declared averages, in their order.

    Returns:
      the kinds that the averages add to the declaration, and the averages.

    Raises:
      DeclarationError: a kind that does not exist, has no leaves, is frozen, or is the plan's own; leaves that are not
        made of floating-point numbers; something that is not an `EMA`; a name that is taken; a schedule that does not
        return a number.
    """
    resolved: list[Average] = []
    key_of: dict[str, Any] = {}  # by the name of an average, the key that declares it
    added = {}
    for key, given in averages.items():
        names = (key,) if isinstance(key, str) else tuple(key)
        emas = given if isinstance(given, list | tuple) else (given,)
        for ema in emas:
            if not isinstance(ema, EMA):
                is_plain = isinstance(ema, int | float | str) or ema is EMA
                raise DeclarationError(
                    f"The average of {key!r} is {repr(ema) if is_plain else type(ema).__name__}, not an sw.EMA.",
                    kind=names[0] if names else None,
                    hint=f"averages={{{key!r}: sw.EMA(0.999)}}",
                )
            _check_name(ema, kinds, key_of, key)
            _check_numbers(ema)
            key_of[ema.name] = key
            added[ema.name] = kinds[ema.name] if ema.name in kinds else Kind(EMA)
        for name in names:
            if name in kinds and (name == OPTIMIZER or kinds[name].of is EMA):
                raise DeclarationError(
                    f"The kind {name!r} cannot be averaged: it belongs to the training, not to the model.",
                    kind=name,
                    hint="averages={'params': sw.EMA(0.999)}",
                )
        # Leaves without arrays, such as a parameter of None, have nothing to average.
        sources = sources_of("average", names, kinds, [row for row in rows if row.specs], "has no average")
        for ema in emas:
            for name in names:
                leaves = tuple((row.path, row.specs, row.structure) for row in sources if row.kind == name)
                resolved.append(Average((name,), leaves, ema))
    return added, tuple(resolved)


def _check_name(ema: EMA, kinds: Mapping[str, Kind], key_of: Mapping[str, Any], key: Any) -> None:
    """Checks that neither another average nor a kind of the model has the name of an average."""
    renamed = f"sw.EMA(..., name={ema.name + '_slow'!r})"
    if ema.name in key_of:
        first = key_of[ema.name]
        names = [name for each in (first, key) for name in (each if isinstance(each, tuple) else (each,))]
        joint = f"averages={{{tuple(dict.fromkeys(names))!r}: sw.EMA(...)}}  # one for both\nor {renamed}"
        raise DeclarationError(
            f"Two averages are called {ema.name!r}: under {first!r} and under {key!r}.",
            kind=ema.name,
            hint=renamed if first == key else joint,
        )
    kind = kinds.get(ema.name)
    if kind is None:
        return
    if kind.of is not EMA:
        raise DeclarationError(
            f"The average {ema.name!r} has the name of a kind of the model.",
            kind=ema.name,
            hint=f"{renamed}\nto declare how averages are handled: {ema.name}=sw.Kind(sw.EMA, ...)",
        )
    if kind.frozen or kind.restart is not None or kind.batch_axis is not None:
        raise DeclarationError(
            f"The kind {ema.name!r} is made of averages: they change in every update, start as the values that they "
            "track, and have no slots.",
            kind=ema.name,
            hint=f"{ema.name}=sw.Kind(sw.EMA, ...) without frozen, restart and batch_axis",
        )


def _check_numbers(ema: EMA) -> None:
    """Checks that JAX has the dtype of an average, and that its schedule returns a number."""
    if ema.dtype is not None and jax.dtypes.canonicalize_dtype(ema.dtype) != ema.dtype:
        raise DeclarationError(
            f"The average {ema.name!r} cannot be {ema.dtype}: this process has no 64-bit numbers.",
            kind=ema.name,
            hint="jax.config.update('jax_enable_x64', True)  # before any array is made",
        )
    if not ema.schedule:
        return
    try:
        decay: Any = jax.eval_shape(ema.schedule, jax.ShapeDtypeStruct(*_COUNT))
    except (TypeError, ValueError) as error:
        raise DeclarationError(
            f"The decay of the average {ema.name!r} is a schedule that cannot be called: {str(error).splitlines()[0]}",
            kind=ema.name,
            hint=_WARMUP,
        ) from error
    is_array = hasattr(decay, "dtype")
    if not (is_array and decay.shape == () and jnp.issubdtype(decay.dtype, jnp.floating)):
        shown = f"{decay.dtype}{list(decay.shape)}" if is_array else type(decay).__name__
        raise DeclarationError(
            f"The decay of the average {ema.name!r} is a schedule that returns {shown}, not a number.",
            kind=ema.name,
            hint=_WARMUP,
        )
