"""The figures that a measured train step returns beside its loss.

However many leaves there are, they are two arrays, so measuring adds two outputs to the compiled step: norms and
largest absolute values in one, numbers of elements that are not finite in the other, with one column for each leaf and
for each thing that is measured of it.  Which column belongs to which leaf is static.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any, Literal, SupportsIndex

import jax
import numpy as np

from statewise._src.common.numbers import whole_number
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.tables import ShownData, Table, format_count
from statewise._src.core.usable import check_concrete, check_untraced
from statewise._src.plan.tables import PlanTables
from statewise.errors import DeclarationError, StructureError

__all__ = ["MEASURES", "Columns", "Measure", "Measured"]

Measure = Literal["params", "grads", "updates", "written"]
# In the order in which a step computes them, each with its name in keys and tables.
MEASURES: dict[Measure, str] = {"written": "written", "grads": "grad", "updates": "update", "params": "param"}

_SHOWN = 10
_ONE = "one = jax.tree.map(lambda array: array[-1], measured)  # of the last step"


class Columns:
    """Which leaves the columns of a `Measured` belong to; static, and equal by value.

    Attributes:
      tables: the tables of the plan.
      entries: for each column what is measured, and the number of the array.
    """

    __slots__ = ("_hash", "entries", "tables")

    def __init__(self, tables: PlanTables, entries: tuple[tuple[Measure, int], ...]) -> None:
        self.tables, self.entries, self._hash = tables, entries, hash((tables, entries))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Columns) and self.tables is other.tables and self.entries == other.entries

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Columns({len(self.entries)})"


@dataclasses.dataclass(frozen=True, slots=True)
class _Figures:
    """What is known of some leaves together: of one, of a layer, of a kind."""

    norm: float
    largest: float
    nonfinite: int | float  # not an integer in a mean over steps


# A kind, and the first keys of a path.
_Place = tuple[str, Path]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("figures", "counts"), meta_fields=("columns",))
@dataclasses.dataclass(frozen=True, eq=False)
class Measured(ShownData):
    """What a train step with `measure=` measured: a pytree of two arrays, which prints as a table by kind and layer.

    Each leaf has a norm (the root of the sum of its squares), a largest absolute value, and a number of elements that
    are not finite.  These are measured of `"written"`, what the function wrote; of `"grads"`, the gradients; of
    `"updates"`, the new parameters minus the old ones; and of `"params"`, the new parameters.
    Where an element is NaN, so are norm and largest value, as in NumPy.  Random streams are not measured.

    Attributes:
      figures: norms and largest absolute values, of shape (2, columns), in at least float32.
      counts: numbers of elements that are not finite, of shape (columns,), int32.
      columns: which leaf each column belongs to; static.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(1, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model, optimizers={"params": optax.sgd(0.5)}).take(model)
      >>> @sw.train_step(measure=True)
      ... def train(model, x, y):
      ...     return ((model(x) - y) ** 2).mean()
      >>> state, (loss, measured) = train(state, jnp.ones((4, 1)), jnp.zeros((4, 1)))
      >>> figures = measured.to_dict(depth=1)
      >>> figures["grad_norm/params/kernel"], figures["update_norm/params/kernel"]
      (2.0, 1.0)
      >>> measured.nonfinite
      ()
      >>> print(measured)
      measured by kind and layer
      kind    path    grad norm  grad max  update norm  update max  param norm  param max
      -----------------------------------------------------------------------------------
      params  bias            2         2            1           1           1          1
      params  kernel          2         2            1           1           0          0
      -----------------------------------------------------------------------------------
      total                2.83         2         1.41           1           1          1
    """

    figures: Any
    counts: Any
    columns: Columns

    @property
    def nonfinite(self) -> tuple[Leaf, ...]:
        """Returns the leaves with elements that are not finite, each once, with a `note` that says what and how many.

        They are in the order in which the step computes: what the function wrote, then gradients, updates, and new
        parameters, each in the order of the plan.  So the first is the closest to the cause.
        """
        _, counts = self._read()
        arrays = self.columns.tables.arrays
        found: dict[Path, Leaf] = {}
        for (what, number), count in zip(self.columns.entries, counts.tolist(), strict=True):
            leaf = arrays[number].leaf
            if count and leaf.path not in found:
                note = f"{what}: {format_count(count)} of {format_count(arrays[number].held.size)} not finite"
                found[leaf.path] = dataclasses.replace(leaf, note=note)
        return tuple(found.values())

    def table(self, depth: SupportsIndex = 2) -> Table:
        """Returns a table with a line for each layer: the first `depth` keys of the leaves' paths.

        Args:
          depth: the number of keys.
        """
        figures = self._figures(depth)
        whats = [what for what in MEASURES if any(what == measured for measured, _ in figures)]
        is_finite = not any(each.nonfinite for each in figures.values())
        names = [f"{MEASURES[what]} {figure}" for what in whats for figure in ("norm", "max")]

        def line(first: tuple[str, str], place: _Place, of: dict[tuple[Measure, _Place], _Figures]) -> tuple[str, ...]:
            cells, bad = list(first), []
            for what in whats:
                each = of.get((what, place))
                cells += ["-", "-"] if each is None else [f"{each.norm:.3g}", f"{each.largest:.3g}"]
                if each is not None and each.nonfinite:
                    bad.append(f"{what} {each.nonfinite:,}")
            return tuple(cells if is_finite else [*cells, ", ".join(bad) or "-"])

        places = self._places(depth)
        everywhere: _Place = ("", ())
        total = {
            (what, everywhere): _together([each for (of, _), each in figures.items() if of == what]) for what in whats
        }
        leaves = () if is_finite else self.nonfinite
        first = tuple((leaf.kind or "", format_path(leaf.path), leaf.note) for leaf in leaves[:_SHOWN])
        below = Table(f"the first of {len(leaves)} that are not finite", ("kind", "path", "what"), first)
        return Table(
            "measured by kind and layer",
            ("kind", "path", *names, *([] if is_finite else ["not finite"])),
            tuple(line((kind, format_path(path) if path else ""), (kind, path), figures) for kind, path in places),
            right=tuple(names),
            footer=line(("total", ""), everywhere, total),
            below=below if leaves else None,
        )

    def to_dict(self, depth: SupportsIndex | None = None) -> dict[str, Any]:
        """Returns the figures as a flat dict for a logger: `{"grad_norm/params/blocks/0": 0.1, ...}`.

        The keys are `written_`, `grad_`, `update_` or `param_`, with `norm`, `max` or `nonfinite`, then the kind and
        the path as a table prints it.  Leaves with the same key are taken together: the norm is the root of the sum of
        squares, the largest value is the largest, the counts are added.

        Args:
          depth: the number of keys of the path, after the kind; 0 for one figure for each kind, None for each leaf.

        Raises:
          StructureError: the figures are of several steps, or are being traced.
          DeclarationError: `depth` is not a number of keys.
        """
        groups: dict[tuple[Measure, str], list[_Figures]] = {}
        for (what, (kind, path)), each in self._figures(depth).items():
            # Two paths may be one text: the keys `a`, `b` and the key `a/b`.
            groups.setdefault((what, format_path((kind, *path))), []).append(each)
        figures = {key: _together(group) for key, group in groups.items()}
        flat: dict[str, Any] = {}
        for what, name in MEASURES.items():
            for figure, attribute in (("norm", "norm"), ("max", "largest"), ("nonfinite", "nonfinite")):
                for (measured, text), each in figures.items():
                    if measured == what:
                        flat[f"{name}_{figure}/{text}"] = getattr(each, attribute)
        return flat

    def to_json(self, depth: SupportsIndex | None = None) -> str:
        """Returns the figures as JSON; a number that is not finite is text, `nan` or `inf`.

        Args:
          depth: as that of `to_dict`.
        """
        flat = {key: value if math.isfinite(value) else str(value) for key, value in self.to_dict(depth).items()}
        return json.dumps(flat, indent=2, allow_nan=False)

    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two arrays on the host, checked."""
        arrays = [self.figures, self.counts]
        check_concrete(arrays, "read", "state, (loss, measured) = train(state, ...)", subject="What is measured")
        hint = "return measured from the function under jax.jit, and read it outside"
        check_untraced(arrays, "read", hint, subject="What is measured")
        figures, counts = (np.asarray(array) for array in arrays)
        count = len(self.columns.entries)
        if figures.shape != (2, count) or counts.shape != (count,):
            raise StructureError(
                f"What is measured here is not of one step: its figures have the shape {figures.shape}, "
                f"not {(2, count)}.",
                hint=_ONE,
            )
        return figures.astype(np.float64), counts

    def _entries(self, depth: Any) -> Iterator[tuple[Measure, int, _Place]]:
        """Yields what each column measures, the number of its array, and its place at a depth."""
        if depth is not None and whole_number(depth, 0) is None:
            raise DeclarationError(f"depth={depth!r} is not a number of keys of a path.", hint="depth=2")
        for what, number in self.columns.entries:
            leaf = self.columns.tables.arrays[number].leaf
            yield what, number, (leaf.kind or "", leaf.path[:depth])

    def _places(self, depth: SupportsIndex) -> list[_Place]:
        """Returns the places in the order of the plan."""
        ordered = sorted(self._entries(depth), key=lambda entry: entry[1])
        return list(dict.fromkeys(place for _, _, place in ordered))

    def _figures(self, depth: Any) -> dict[tuple[Measure, _Place], _Figures]:
        """Returns the figures by what is measured and by place."""
        entries = list(self._entries(depth))
        figures, counts = self._read()
        groups: dict[tuple[Measure, _Place], list[_Figures]] = {}
        columns = zip(*figures.tolist(), counts.tolist(), strict=True)
        for (what, _, place), (norm, largest, count) in zip(entries, columns, strict=True):
            groups.setdefault((what, place), []).append(_Figures(norm, largest, count))
        return {key: _together(group) for key, group in groups.items()}


def _together(group: list[_Figures]) -> _Figures:
    if len(group) == 1:
        return group[0]
    largest = np.max([each.largest for each in group])  # NaN if one of them is
    # `hypot` because the square of a norm may be too large for a float.
    return _Figures(math.hypot(*(each.norm for each in group)), float(largest), sum(each.nonfinite for each in group))
