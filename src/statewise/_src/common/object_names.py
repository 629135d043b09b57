"""The names of objects that are planned, watched or inspected together.

Objects are passed by position, `kinds.plan(policy, reference)`, or by name, `kinds.plan(policy=policy,
reference=reference)`.  A name is the first segment of its leaves' paths, in filters and in print; a position is only
printed.  A step's function takes named objects in the order in which the names were given.
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from statewise.errors import DeclarationError, StructureError

__all__ = ["given", "in_order", "names_given"]

# The parameters of the functions that take named objects; an object cannot have one of these names.
TAKEN = ("averages", "copy", "decode_length", "expect", "ignore", "kinds", "mesh", "optimizers", "pack", "steps")
_BOTH = "Pass objects by position or by name, not both: {} and {}."


def given(objects: Sequence[Any], named: Mapping[str, Any], call: str) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Returns the objects and their names, for a call that takes both.

    Args:
      objects: the objects passed by position.
      named: the objects passed by name.
      call: the function, for a hint: `kinds.plan`.

    Returns:
      the objects, and their names: none if they were passed by position.

    Raises:
      DeclarationError: some were passed by position and some by name; or a name is invalid.
    """
    if objects and named:
        names = [f"{_free(number, named)}=..." for number in range(len(objects))]
        hint = f"{call}({', '.join([*names, *map(_shown, named)])})"
        raise DeclarationError(_BOTH.format(len(objects), ", ".join(named)), hint=hint)
    for name in named:
        check_name(name, call)
    return tuple(objects) or tuple(named.values()), tuple(named)


def _free(number: int, named: Mapping[str, Any]) -> str:
    name = ("model", "other")[number] if number < 2 else f"object_{number}"
    return f"{name}_object" if name in named else name


def _shown(name: str) -> str:
    return f"{name}={name}"


def check_name(name: str, call: str = "kinds.plan") -> None:
    """Checks that an object can have a name.

    Raises:
      DeclarationError: it is not an identifier, or is the name of a parameter.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        fixed = "".join(char if char.isalnum() else "_" for char in name).strip("_")
        fixed = fixed if fixed.isidentifier() and not keyword.iskeyword(fixed) else f"object_{fixed}"
        raise DeclarationError(
            f"{name!r} cannot name an object: it is not a Python identifier.", hint=f"{call}({fixed}=...)"
        )
    if name in TAKEN:
        raise DeclarationError(
            f"{name!r} cannot name an object: it is the name of a parameter.", hint=f"{call}({name}_object=...)"
        )


def in_order(names: Sequence[str], objects: Sequence[Any], named: Mapping[str, Any], verb: str) -> tuple[Any, ...]:
    """Returns the objects in the order of a plan, passed by position or by name.

    Args:
      names: the names of the planned objects; empty if they have none.
      objects: the objects passed by position.
      named: the objects passed by name.
      verb: the method of the plan that was called.

    Raises:
      StructureError: some were passed by position and some by name; names that the plan does not have, or names for
        a plan without names.
    """
    if not named:
        return tuple(objects)
    first = "" if verb == "take" else "state, "
    if not names:
        raise StructureError(
            f"The plan's objects have no names, but {_are(list(named))} given.",
            hint=f"plan.{verb}({first}{', '.join(named)})  # in the order in which they were planned\n"
            f"or plan them by name: plan = kinds.plan({', '.join(map(_shown, named))})",
        )
    hint = f"plan.{verb}({first}{', '.join(map(_shown, names))})"
    if objects:
        raise StructureError(_BOTH.format(len(objects), ", ".join(named)), hint=hint)
    if set(named) != set(names):
        missing = [name for name in names if name not in named]
        unknown = [name for name in named if name not in names]
        words = [f"{_are(missing)} missing"] if missing else []
        words += [f"{_are(unknown)} unknown"] if unknown else []
        raise StructureError(f"The plan has the objects {', '.join(names)}: {' and '.join(words)}.", hint=hint)
    return tuple(named[name] for name in names)


def _are(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def names_given(names: Any, option: str, noun: str = "kinds") -> tuple[str, ...]:
    """Returns the names in an option: one name, or several in any collection.

    Raises:
      DeclarationError: something other than names; also a dict, whose values would have no meaning.
    """
    several = isinstance(names, Iterable) and not isinstance(names, str | bytes | dict)
    listed = tuple(names) if several else (names,)
    if not all(isinstance(name, str) for name in listed):
        example = {"kinds": "params", "rules": "tied-weights"}[noun]
        raise DeclarationError(f"{option}={names!r} does not name {noun}.", hint=f"{option}=({example!r},)")
    return listed
