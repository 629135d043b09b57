"""One kind's arrays, and what is known of their values on the host: which they are, and from which they were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from statewise._src.sharding.part_shardings import UNKNOWN, PartShardings, part_shardings_of

__all__ = ["Origin", "Part", "Version"]


class Version:
    """The identity of one kind's values: two parts with one version have the same values.  Compared by identity."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """The values of other kinds that a kind's values were made from.

    Attributes:
      versions: the version of each of those kinds.
      renewed: the slots that were restarted since one of them changed: for which versions, and a boolean for each slot.
    """

    versions: Mapping[str, Version]
    renewed: tuple[Mapping[str, Version], np.ndarray] | None = None


class Part:
    """One kind's arrays, shared by the states that have them in common.

    Attributes:
      arrays: the arrays, in the order of the plan.
      donated_by: the step that donated some of them; None while all exist.
      shardings: their shardings on a mesh; `UNKNOWN` until `places` is called.
      view: what `state[kind]` returns, once it was accessed.
      known_version: the version of the values, if it was asked for, or is known from a part that had them before.
      origin: the values that these were made from, if their kind depends on others.  None means: from those that are
        beside them in every state that has this part; `versions.settle` sets it as soon as one is made where that is
        no longer so.
    """

    __slots__ = ("_ids", "arrays", "donated_by", "known_version", "origin", "shardings", "view")

    def __init__(self, arrays: tuple[Any, ...], shardings: PartShardings | None = UNKNOWN) -> None:
        self.arrays = arrays
        self.donated_by: str | None = None
        self.shardings = shardings
        self.view: Any = None
        self.origin: Origin | None = None
        self.known_version: Version | None = None
        self._ids: frozenset[int] | None = None

    def ids(self) -> frozenset[int]:
        """Returns the identities of the arrays."""
        if self._ids is None:
            self._ids = frozenset(map(id, self.arrays))
        return self._ids

    def places(self) -> PartShardings | None:
        """Returns the shardings of the arrays on a mesh; None if none is on a mesh."""
        # Only when first asked: a state that is not on a mesh never pays for it, and a step passes them on.
        if self.shardings is UNKNOWN:
            self.shardings = part_shardings_of(self.arrays)
        return self.shardings

    def version(self) -> Version:
        """Returns the version of the values, made when first asked for: most parts never need one."""
        if self.known_version is None:
            self.known_version = Version()
        return self.known_version
