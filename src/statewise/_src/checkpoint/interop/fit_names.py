"""Fitting files of other names into a target, for a conversion."""

from __future__ import annotations

import dataclasses

from statewise._src.checkpoint.interop.match import Fit, fit
from statewise._src.checkpoint.interop.named import as_ours
from statewise._src.checkpoint.interop.sources import NAMED, Source
from statewise._src.core.plan import State
from statewise._src.names.names import NamesData

__all__ = ["fit_names"]


def fit_names(source: Source, to: str, target: State, names: NamesData, cast: bool) -> tuple[Source, Fit]:
    """Fits the leaves of a target from files of other names.

    Returns:
      the files as a source of our paths, and what happens to each array.
    """
    ours, problems = as_ours(source, names, target)
    ours = dataclasses.replace(ours, format=NAMED)
    fitted = fit(ours, to, target, None, cast, {leaf.path for leaf in problems.leaves})
    fitted.problems.extend(problems)
    return ours, fitted
