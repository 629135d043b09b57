"""What another program calls one of our arrays, or the parts of it, and how the axes there become ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from statewise._src.common.numbers import whole_number
from statewise._src.names.pattern import Pattern
from statewise._src.names.template import Template
from statewise.errors import DeclarationError

__all__ = ["Name"]


class Name:
    """What one of our arrays is called elsewhere, and how it is laid out there.

    It is data: equal by value, hashable, and prints as code.

    Args:
      names: their name, `"model.layers.{i}.mlp.up_proj.weight"`; or several, of arrays that are joined into one of
        ours.  `{i}` stands for one key: the same as in our path, or, where our path does not have it, one number after
        another from 0, whose arrays are stacked.
      pattern: how their axes become ours, in the notation of einops, `"o i -> i o"`; None if they are the same.  An
        array that is stacked has one more axis, the first; one that is joined is meant as a whole.
      join: the axis of their arrays along which several are joined; before they are stacked.
      sizes: the length of each of several along that axis; None if they are equal.
      **axes: the lengths of axes in the pattern that do not follow from the shape of our array: `h=64`.

    Raises:
      DeclarationError: something is not a name, or the pattern cannot be inverted.
      StatewiseError: there is a pattern, and the package einops is not installed.

    Example:
      >>> import statewise as sw
      >>> query = sw.Name("layers.{i}.q_proj.weight", "(n h) d -> d n h", h=64)
      >>> query
      sw.Name('layers.{i}.q_proj.weight', '(n h) d -> d n h', h=64)
      >>> query == sw.Name("layers.{i}.q_proj.weight", "(n h) d -> d n h", h=64)
      True
    """

    __slots__ = ("axes", "join", "names", "parsed", "pattern", "sizes", "templates")

    names: tuple[str, ...]
    pattern: str | None
    join: int | None
    sizes: tuple[int, ...] | None
    axes: tuple[tuple[str, int], ...]
    templates: tuple[Template, ...]
    parsed: Pattern | None

    def __init__(
        self,
        names: str | Sequence[str],
        pattern: str | None = None,
        *,
        join: SupportsIndex | None = None,
        sizes: Sequence[int] | None = None,
        **axes: SupportsIndex,
    ) -> None:
        listed = (names,) if isinstance(names, str) else tuple(_sequence(names))
        templates = tuple(map(Template.parse, listed))
        _check_joined(listed, templates, join, sizes)
        if axes and pattern is None:
            given = ", ".join(f"{name}={length!r}" for name, length in axes.items())
            raise DeclarationError(f"{given} is the length of an axis, but there is no pattern.", hint=f"{listed[0]!r}")
        parsed = None if pattern is None else Pattern.parse(pattern, axes)
        values = {
            "names": listed,
            "pattern": pattern,
            "join": whole_number(join),
            "sizes": None if sizes is None else tuple(sizes),
            "axes": tuple((axis, int(length)) for axis, length in sorted(axes.items())),
            "templates": templates,
            "parsed": parsed,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A Name does not change; {name} cannot be set.")

    def _key(self) -> tuple[Any, ...]:
        return self.names, self.pattern, self.join, self.sizes, self.axes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Name) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"sw.Name({', '.join(self._arguments())})"

    def _arguments(self) -> list[str]:
        shown = [repr(self.names[0] if self.is_single else list(self.names))]
        shown += [repr(self.pattern)] if self.pattern is not None else []
        shown += [f"{name}={length}" for name, length in self.axes]
        shown += [f"join={self.join}"] if self.join is not None else []
        return shown + ([f"sizes={self.sizes}"] if self.sizes is not None else [])

    @property
    def is_single(self) -> bool:
        """Returns whether there is one name."""
        return len(self.names) == 1

    def code(self) -> str:
        """Returns the name as a value of `sw.Names`: only the text where that is all."""
        return self._arguments()[0] if self._key()[1:] == (None, None, None, ()) else repr(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the name as plain data, for JSON."""
        facts: dict[str, Any] = {"names": list(self.names), "pattern": self.pattern, "join": self.join}
        facts |= {"sizes": None if self.sizes is None else list(self.sizes), "axes": dict(self.axes)}
        return {field: fact for field, fact in facts.items() if fact not in (None, {})}

    @classmethod
    def from_dict(cls, data: Any) -> Name:
        """Returns the name that `to_dict` wrote.

        Raises:
          DeclarationError: the data is something else.
        """
        known = {"names", "pattern", "join", "sizes", "axes"}
        if not isinstance(data, Mapping) or "names" not in data or not known.issuperset(data):
            raise DeclarationError("This is not the data of a Name.", hint="what name.to_dict() returned")
        axes = data.get("axes", {})
        return cls(data["names"], data.get("pattern"), join=data.get("join"), sizes=data.get("sizes"), **axes)


def _sequence(names: Any) -> Sequence[str]:
    if isinstance(names, Sequence) and names:
        return names
    shown = "empty" if isinstance(names, Sequence) else type(names).__name__
    raise DeclarationError(
        f"The names of a Name are {shown}, not a text or several.", hint="sw.Name('model.embed_tokens.weight')"
    )


def _check_joined(names: Sequence[str], templates: Sequence[Template], join: Any, sizes: Any) -> None:
    """Checks what several names need, and a single one does not have."""
    if len(names) == 1:
        if join is not None or sizes is not None:
            raise DeclarationError(f"{names[0]!r} is one name, and there is nothing to join.", hint=repr(names[0]))
        return
    hint = f"sw.Name({list(names)}, join=0)"
    if whole_number(join) is None:
        raise DeclarationError(f"Several names need an axis along which they are joined, not join={join!r}.", hint=hint)
    if len({*names}) < len(names):
        raise DeclarationError(
            f"The names {', '.join(map(repr, names))} are not different.", hint="sw.Name(['q', 'k'], join=0)"
        )
    fields = {frozenset(template.fields) for template in templates}
    if len(fields) > 1:
        raise DeclarationError(
            f"The names {', '.join(map(repr, names))} have different placeholders.",
            hint="sw.Name(['layers.{i}.q', 'layers.{i}.k'], join=0)",
        )
    if sizes is None:
        return
    is_sizes = isinstance(sizes, Sequence) and all(isinstance(size, int) and size >= 0 for size in sizes)
    if not is_sizes or len(sizes) != len(names):
        raise DeclarationError(
            f"sizes={sizes!r} does not give a length for each of {len(names)} names.",
            hint=f"sizes={tuple(range(1, len(names) + 1))}",
        )
