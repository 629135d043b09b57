"""The package as the API page shows it: docstrings in griffe's words, annotations without names that are private.

- Our `Example:` sections are read as the `Examples:` that griffe knows: under any other heading griffe reads
  `>>> names["a"][0]` as Markdown, with a link in it.
- An annotation that names a short private alias shows what it stands for: `Missing` becomes
  `Literal["error", "keep", "restart"]`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import griffe

PRIVATE = "statewise._src."
LONGEST = 60  # characters: a longer alias is clearer by its name, `Filter` say


class Examples(griffe.Extension):
    """Renames the heading, in memory only."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Renames it in an object that griffe has read from the source."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


class Aliases(griffe.Extension):
    """Writes private aliases of types out, in memory only."""

    def on_package(self, *, pkg: Any, loader: Any, **_: Any) -> None:
        """Writes them out when griffe has read everything, so that every name can be resolved."""
        self._modules = loader.modules_collection
        self._visit(pkg)

    def _visit(self, obj: Any) -> None:
        for member in obj.members.values():
            if member.is_alias:  # what is imported is visited where it is defined
                continue
            if member.is_function:
                member.returns = self._written_out(member.returns)
                for parameter in member.parameters:
                    parameter.annotation = self._written_out(parameter.annotation)
            elif member.is_attribute:
                member.annotation = self._written_out(member.annotation)
            if not member.is_attribute:
                self._visit(member)

    def _written_out(self, node: Any) -> Any:
        """Returns an annotation with the value of each private alias in place of its name."""
        if isinstance(node, list | tuple):
            return type(node)(self._written_out(item) for item in node)
        if isinstance(node, griffe.ExprName) and node.canonical_path.startswith(PRIVATE):
            target = self._target(node.canonical_path)
            if target is not None and target.is_attribute and isinstance(target.value, griffe.Expr):
                value = self._written_out(target.value)
                return value if len(str(value)) <= LONGEST else node
        if not isinstance(node, griffe.Expr) or isinstance(node, griffe.ExprName):
            return node
        node = copy.copy(node)
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if isinstance(value, griffe.Expr | list | tuple):
                setattr(node, field.name, self._written_out(value))
        return node

    def _target(self, path: str) -> Any:
        try:
            return self._modules.get_member(path)
        except KeyError:
            return None
