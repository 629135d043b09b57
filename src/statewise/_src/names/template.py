"""Names with placeholders: `layers/{i}/kernel` matches `layers/3/kernel` with i = 3, and is filled with it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping

from statewise.errors import DeclarationError

__all__ = ["Template"]

_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """A name with placeholders.

    Attributes:
      text: the name, `layers/{i}/kernel`.
      fields: the placeholders, in their order, each once.
    """

    text: str
    fields: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Reads a name.

        Raises:
          DeclarationError: it is not a text, is empty, or has a brace that does not belong to a placeholder.
        """
        if not isinstance(text, str) or not text.strip("/"):
            shown = repr(text) if isinstance(text, str) else type(text).__name__
            raise DeclarationError(f"{shown} is not a name.", hint="'layers/{i}/kernel'")
        fields = _FIELD.findall(text)
        rest = _FIELD.sub("", text)
        if "{" in rest or "}" in rest or not all(field.isidentifier() for field in fields):
            raise DeclarationError(
                f"The name {text!r} has a brace that is not part of a placeholder.", hint="'layers/{i}/kernel'"
            )
        return cls(text, tuple(dict.fromkeys(fields)))

    def match(self, text: str) -> dict[str, str] | None:
        """Returns what each placeholder stands for in a name; None if the name is another one.

        A placeholder stands for one key: it matches neither a slash nor, in a name of dots, a dot.
        """
        found = _regex(self.text).fullmatch(text)
        return None if found is None else found.groupdict()

    def fill(self, values: Mapping[str, object]) -> str:
        """Returns the name with these values."""
        return _FIELD.sub(lambda field: str(values[field[1]]), self.text)


@functools.lru_cache(maxsize=4096)
def _regex(text: str) -> re.Pattern[str]:
    key = "[^/]+" if "/" in text or "." not in _FIELD.sub("", text) else "[^./]+"
    seen: set[str] = set()
    parts, end = [], 0
    for field in _FIELD.finditer(text):
        name = field[1]
        parts.append(re.escape(text[end : field.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{key})")
        seen.add(name)
        end = field.end()
    return re.compile("".join(parts) + re.escape(text[end:]))
