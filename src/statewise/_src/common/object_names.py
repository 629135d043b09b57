"""The names of objects that are planned, watched or looked at together.

Objects are given by position, `kinds.plan(policy, reference)`, or by name, `kinds.plan(policy=policy,
reference=reference)`.  A name is the first segment of its leaves' paths, for filters as in print, where a position is
only printed.  The order in which the names are given is that in which a step's function gets the objects.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from statewise.errors import DeclarationError, StructureError

__all__ = ["given", "in_order", "names_given"]

# What the functions that take named objects call their own arguments.
TAKEN = ("averages", "copy", "decode_length", "expect", "ignore", "kinds", "mesh", "optimizers", "pack")


def given(objects: Sequence[Any], named: Mapping[str, Any], call: str) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The objects and their names, of a call that takes both.

    Args:
      objects: those given by position.
      named: those given by name.
      call: what is called, for a hint: `kinds.plan`.

    Returns:
      the objects, and their names: none where they were given by position.

    Raises:
      DeclarationError: some were given by position and some by name; a name that cannot stand.
    """
    if objects and named:
        names = [f"{_free(number, named)}=..." for number in range(len(objects))] + list(map(_shown, named))
        raise DeclarationError(
            f"Objects are given by position or by name, not both: {len(objects)} and {', '.join(named)}.",
            hint=f"{call}({', '.join(names)})",
        )
    for name in named:
        check_name(name, call)
    return tuple(objects) or tuple(named.values()), tuple(named)


def _free(number: int, named: Mapping[str, Any]) -> str:
    name = ("model", "other")[number] if number < 2 else f"object_{number}"
    return f"{name}_object" if name in named else name


def _shown(name: str) -> str:
    return f"{name}={name}"


def check_name(name: str, call: str = "kinds.plan") -> None:
    """Refuses what cannot name an object.

    Raises:
      DeclarationError: no identifier, or a word that is an argument's.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        fixed = "".join(char if char.isalnum() else "_" for char in name).strip("_")
        fixed = fixed if fixed.isidentifier() and not keyword.iskeyword(fixed) else f"object_{fixed}"
        raise DeclarationError(
            f"{name!r} cannot name an object: it is not a Python identifier.", hint=f"{call}({fixed}=...)"
        )
    if name in TAKEN:
        raise DeclarationError(
            f"{name!r} cannot name an object: it is an argument's name.", hint=f"{call}({name}_object=...)"
        )


def in_order(names: Sequence[str], objects: Sequence[Any], named: Mapping[str, Any], verb: str) -> tuple[Any, ...]:
    """The objects in the order of a plan, given by position or by name.

    Args:
      names: the names of the planned objects; none where they have none.
      objects: those given by position.
      named: those given by name.
      verb: the plan's method that is called.

    Raises:
      DeclarationError: some were given by position and some by name.
      StructureError: names that the plan does not have, or names for a plan without.
    """
    if not named:
        return tuple(objects)
    first = "" if verb == "take" else "state, "
    if not names:
        raise StructureError(
            f"The plan's objects have no names, but {', '.join(named)} {'is' if len(named) == 1 else 'are'} given.",
            hint=f"plan.{verb}({first}{', '.join(named)})  # in the order in which they were planned\n"
            f"or, to plan them by name: plan = kinds.plan({', '.join(map(_shown, named))})",
        )
    hint = f"plan.{verb}({first}{', '.join(map(_shown, names))})"
    if objects:
        raise DeclarationError(
            f"Objects are given by position or by name, not both: {len(objects)} and {', '.join(named)}.", hint=hint
        )
    if set(named) != set(names):
        missing = [name for name in names if name not in named]
        odd = [name for name in named if name not in names]
        words = [f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
        words += [f"{', '.join(odd)} {'is' if len(odd) == 1 else 'are'} not among them"] if odd else []
        raise StructureError(f"The plan is of the objects {', '.join(names)}: {' and '.join(words)}.", hint=hint)
    return tuple(named[name] for name in names)


def names_given(names: Any, option: str, noun: str = "kinds") -> tuple[str, ...]:
    """The names that an option was given: one, or several in whatever holds them.

    Raises:
      DeclarationError: something else than names; or a dict, of which nobody knows what its values were to say.
    """
    several = isinstance(names, Iterable) and not isinstance(names, str | bytes | dict)
    found = tuple(names) if several else (names,)
    if not all(isinstance(name, str) for name in found):
        example = {"kinds": "params", "rules": "tied-weights"}[noun]
        raise DeclarationError(f"{option}={names!r} names no {noun}.", hint=f"{option}=({example!r},)")
    return found
