"""The Flax that is announced: one whose public functions return plain dicts where they return `nnx.State` today.

`functions()` gives what replaces them; the fixture `container` puts it into `flax.nnx` for a test, `install` for good.
Only public names change: what Flax does inside is as it is, and sees dicts only where it calls its own public names.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

# `STATEWISE_STATES=dict pytest ...` runs any test under it.
VARIABLE = "STATEWISE_STATES"
IS_DICT = os.environ.get(VARIABLE) == "dict"

RETURNING = ("state", "split", "pop", "from_flat_state", "map_state", "filter_state", "split_state", "merge_state")
RETURNING = (*RETURNING, "diff", "as_pure", "as_immutable_vars", "clone")
# These take an nnx.State alone today, and will have to take what the others return.
TAKING = ("to_flat_state", "to_pure_dict", "replace_by_pure_dict", "map_state", "filter_state", "split_state", "diff")
# These return a function that returns states.
MAKING = ("grad", "value_and_grad", "capture")


def as_dicts(value: Any) -> Any:
    """The same with plain dicts for each `nnx.State` in it."""
    if isinstance(value, nnx.State):
        return _plain(value.raw_mapping)
    if type(value) in (tuple, list):
        return type(value)(map(as_dicts, value))
    if type(value) is dict:
        return {key: as_dicts(item) for key, item in value.items()}
    return value


def _plain(mapping: Any) -> Any:
    return {key: _plain(item) if isinstance(item, nnx.State | dict) else item for key, item in dict(mapping).items()}


def as_state(value: Any) -> Any:
    return nnx.State(value) if type(value) is dict else value


def _returning(fn: Callable[..., Any], taking: bool) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = tuple(map(as_state, args)) if taking else args
        return as_dicts(fn(*given, **kwargs))

    return wrapped


def _making(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        # Without a function these return a decorator.
        again = not (args and callable(args[0]) and not isinstance(args[0], type))
        return (_making if again else functools.partial(_returning, taking=False))(made)

    return wrapped


def functions() -> Iterator[tuple[str, Any]]:
    """The names in `flax.nnx`, each with what it will be."""
    for name in dict.fromkeys((*RETURNING, *TAKING)):
        if hasattr(nnx, name):
            yield name, _returning(getattr(nnx, name), name in TAKING)
    for name in MAKING:
        yield name, _making(getattr(nnx, name))


def install() -> None:
    """Has `flax.nnx` return dicts from now on, in the whole process."""
    for name, function in list(functions()):
        setattr(nnx, name, function)
