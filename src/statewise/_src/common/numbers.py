"""Whole numbers that a user gives."""

from __future__ import annotations

import operator

import numpy as np

__all__ = ["whole_number"]


def whole_number(given: object, least: int | None = None) -> int | None:
    """Returns a whole number of any type, NumPy's among them, as a Python one; None if it is not one, or too small.

    A bool is an int to Python, and no number here.

    Args:
      given: what may be one.
      least: the smallest that is allowed.
    """
    if isinstance(given, bool | np.bool_) or not hasattr(given, "__index__"):
        return None
    try:
        number = operator.index(given)
    except TypeError:  # an array has `__index__`, but raises unless it is one integer
        return None
    return None if least is not None and number < least else number
