"""Plans made of a plan: of the same leaves, in other dtypes, packed, or on a mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from statewise.intern import intern
from statewise.layout import Layout
from statewise.packing import choose
from statewise.paths import Leaf
from statewise.scan import Spec

if TYPE_CHECKING:
    from statewise.plan import Plan
else:
    Plan = Any  # made by a later room

__all__ = ["Variants"]


class Variants(Layout):
    """What makes other plans of a plan; a base of `Plan`, which takes the parts named here."""

    dropped: tuple[Leaf, ...]

    def _like(self, **changed: Any) -> Plan:
        """This plan with some of its parts changed: `kinds`, `rows`, `derived`, `packing`, `copies`."""
        parts: dict[str, Any] = {
            "kinds": self.kinds,
            "graphdef": self._graphdef,
            "rows": self._rows,
            "derived": self._derived,
            "objects": self._objects,
            "names": self._names,
            "dropped": self.dropped,
            "packing": self._packing,
            "copies": self._copies,
        }
        return cast(Plan, intern(type(self)(**(parts | changed))))

    def _with_specs(self, specs: Mapping[str, Sequence[Spec]]) -> Plan:
        """This plan with other shapes or dtypes in the rows of the model."""
        rows = [
            row._replace(specs=tuple(specs[span.kind][span.start : span.stop])) if span.kind in specs else row
            for row, span in zip(self._rows, self._spans, strict=True)
        ]
        # What would be derived from leaves of these dtypes does not matter: it is there already.
        by_path = {row.path: row.specs for row in rows}
        derived = tuple(
            one.recast(by_path, specs.get(one.into, self._specs[one.into])[start:stop])
            for one, (start, stop) in zip(self._derived, self._derived_spans, strict=True)
        )
        plain = self._like(rows=tuple(rows), derived=derived, packing=None, copies=None)
        return plain._pack(tuple(self._packing)) if self._packing else plain

    def _pack(self, kinds: Sequence[str]) -> Plan:
        """This plan with the small arrays of these kinds in few buffers."""
        groups = [
            (group, self._params_of(group), range(*span))
            for group, span in zip(self._groups, self._moment_spans, strict=True)
        ]
        spans = self._derived_spans[len(self._groups) :]
        averages = [(one.kind, one.into, start) for one, (start, _) in zip(self._averages, spans, strict=True)]
        return self._like(packing=choose(self._specs, kinds, groups, averages), copies=None)

    @property
    def _plain(self) -> Plan:
        """This plan with nothing packed, and nothing per device."""
        if not self._packing and not self._copies:
            return cast(Plan, self)
        return self._like(packing=None, copies=None)
