"""`sw.Names`: what the leaves of a model are called elsewhere, and the check of it against files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from statewise._src.checkpoint.interop.named import model_arrays
from statewise._src.checkpoint.interop.open import open_any
from statewise._src.checkpoint.match_names import match_names
from statewise._src.checkpoint.restore_report import RestoreReport
from statewise._src.common.paths import format_path
from statewise._src.common.problems import Problems
from statewise._src.core.plan import Plan
from statewise._src.names.names import NamesData
from statewise._src.names.proposal import NamesProposal, proposed_names
from statewise.errors import StructureError

__all__ = ["Names"]


Files = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class _Infer:
    """`names.infer` and `Names.infer`: of names, which keep their rows, or of none."""

    def __get__(self, names: NamesData | None, cls: type[NamesData]) -> Callable[[Plan, Files], NamesProposal]:
        def infer(plan: Any, path: Any) -> NamesProposal:
            """Proposes names from shapes and similar names, as code to read and paste; see `Names`."""
            return _inferred(cls({}) if names is None else names, plan, path)

        return infer


class Names(NamesData):
    """What every leaf of a model is called in another program's files: one declaration, read in both directions.

    A mapping from our paths to their names: immutable, hashable, equal by value; it prints as code.

    Args:
      rows: for each of our paths, `"layers/{i}/up/kernel"`, their name: a text, a `sw.Name` for arrays that are laid
        out in another way, or None for a leaf that they do not have.  `{i}` stands for one key of a path.  A leaf that
        is tied may have a name for each of its paths.

    Raises:
      DeclarationError: something is not a name; leaves that our path distinguishes would have one name.

    Example:
      >>> import tempfile
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> state = sw.plan(model).take(model)
      >>> names = sw.Names({"kernel": sw.Name("proj.weight", "o i -> i o"), "bias": "proj.bias"})
      >>> folder = tempfile.mkdtemp() + "/published"
      >>> print(sw.convert(state, folder, names=names).ok)
      True
      >>> restored, report = sw.restore(folder, sw.plan(model).abstract(), names=names)
      >>> bool((restored["params"]["kernel"][...] == model.kernel[...]).all())
      True

    `Names.infer(plan, path)` proposes names for the leaves of a plan from shapes and similar names, as code to read,
    correct and paste (`statewise.results.NamesProposal`); `names.infer(plan, path)` keeps the rows that there are, and
    proposes the others.  Neither reads an array.
    """

    __slots__ = ()

    infer = _Infer()

    def check(self, plan: Plan, path: Files) -> RestoreReport:
        """Compares the names with a plan and with files; reads no array but those of a tied leaf's names.

        Args:
          plan: the plan of our model.
          path: their files: a `.safetensors` file, several of them, or a folder.

        Returns:
          what a restore with `cast=True` would do with each leaf, and the names in the files that no row is about;
          `report.ok` says whether the names fit.  Leaves that the files cannot have need no value for it.

        Raises:
          CorruptedError: a file is not what was written.
          RestoreError: there is nothing at the path, or nothing in a known format.
        """
        if not isinstance(plan, Plan):
            raise StructureError(
                f"Names are checked against a plan, not {type(plan).__name__}.",
                hint="names.check(sw.plan(model), path)",
            )
        return match_names(path, open_any(path), self, plan.abstract(), None, cast=True, check=True).matched.report


def _inferred(names: NamesData, plan: object, path: object) -> NamesProposal:
    if not isinstance(plan, Plan):
        raise StructureError(
            f"Names are proposed for a plan, not {type(plan).__name__}.", hint="sw.Names.infer(sw.plan(model), path)"
        )
    source = open_any(path)
    leaves, used = [], set()
    for array in model_arrays(plan.abstract()):
        ways = [way + array.within for way in (array.leaf.path, *array.leaf.aliases)]
        is_known = names.knows(array.leaf, array.within)
        for _, layout in names.layouts(array.leaf, array.within, array.shape, Problems()):
            used |= {*layout.names}
        leaves.append(([([format_path((key,)) for key in way], array.shape) for way in ways], is_known))
    theirs = {entry.name: entry.shape for entry in source.entries if entry.name not in used}
    return proposed_names(leaves, theirs, names)
