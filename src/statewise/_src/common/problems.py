"""A collector of problems: leaves, what is wrong with each, and hints; raised once, with all of them.

Whether the text of the error has the number of leaves in the singular or in the plural is decided here alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from statewise._src.common.paths import Leaf, format_shape
from statewise.errors import StatewiseError

__all__ = ["Problems", "add_change", "counted"]

# The singular of the verbs that follow "{n} leaves" in a message.
_SINGULAR = {"are": "is", "have": "has", "differ": "differs"}


def counted(number: int, singular: str, plural: str) -> str:
    """Returns a number with the noun, and the verb, in agreement: `1 leaf is`, `1,234 leaves are`."""
    return f"{number:,} {singular if number == 1 else plural}"


class Problems:
    """Leaves, each with what is wrong with it; false while there are none.  What is added twice is one problem."""

    def __init__(self, leaves: Iterable[Leaf] = ()) -> None:
        self._leaves: dict[Leaf, None] = dict.fromkeys(leaves)
        self._hints: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._leaves)

    @property
    def leaves(self) -> list[Leaf]:
        """Returns the leaves, each with its note."""
        return list(self._leaves)

    @property
    def hints(self) -> list[str]:
        """Returns the hints, each once."""
        return list(self._hints)

    @property
    def kind(self) -> str | None:
        """Returns the kind of the leaves, if all have the same."""
        kinds = {leaf.kind for leaf in self._leaves}
        return kinds.pop() if len(kinds) == 1 else None

    def add(self, leaf: Leaf, note: str = "", *hints: str) -> None:
        """Adds a leaf, with what is wrong with it, and hints."""
        self._leaves[dataclasses.replace(leaf, note=note) if note else leaf] = None
        self.hint(*hints)

    def hint(self, *hints: str) -> None:
        """Adds hints."""
        self._hints |= dict.fromkeys(filter(None, hints))

    def extend(self, others: Problems) -> None:
        """Adds all problems and hints of another collector."""
        self._leaves |= others._leaves
        self._hints |= others._hints

    def raise_as(
        self, error: type[StatewiseError], message: str, hint: str | None = None, *, cause: BaseException | None = None
    ) -> None:
        """Raises an error with all the problems; does nothing where there are none.

        Args:
          error: the class of the error.
          message: the fact; `{n} leaves` and the verb after it become singular where there is one leaf.
          hint: a hint for all of them; by default those that were added.
          cause: the exception that led here, if one did.
        """
        if self._leaves:
            raise error(
                _in_number(message, len(self)),
                leaves=self.leaves,
                kind=self.kind,
                hint="\n".join(self._hints) if hint is None else hint,
            ) from cause


def add_change(problems: Problems, leaf: Leaf, old: Any, new: Any) -> bool:
    """Adds a leaf if a new array would change its shape or dtype; returns whether it would."""
    changes = (old.shape, old.dtype) != (new.shape, new.dtype)
    if changes:
        problems.add(leaf, f"would become {format_shape(new.shape)} {new.dtype}")
    return bool(changes)


def _in_number(message: str, number: int) -> str:
    return re.sub(
        r"\{n\} leaves (\w+)",
        lambda match: counted(number, f"leaf {_SINGULAR.get(match[1], match[1])}", f"leaves {match[1]}"),
        message,
    )
