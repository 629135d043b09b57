"""What a train step does beside differentiating: microbatches, weights, bad batches, and what it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

from statewise._src.common.numbers import whole_number
from statewise._src.step.arguments import chosen_parameters
from statewise._src.step.measured import MEASURES, Measure
from statewise.errors import DeclarationError

__all__ = ["PLAIN", "NonFinite", "Training"]

NonFinite = Literal["write", "skip"]


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """The options of a train step about its batch and its gradients; the defaults are those of any other step.

    Attributes:
      microbatches: the number of equal parts that the batch is split into.
      weighted: whether the function returns a weight beside its loss.
      whole: the names of arguments that are passed to every part as they are.
      skips_nonfinite: whether a batch with a loss or gradient that is not finite changes nothing.
      measures: what is measured and returned beside the loss.
    """

    microbatches: int = 1
    weighted: bool = False
    whole: frozenset[str] = frozenset()
    skips_nonfinite: bool = False
    measures: frozenset[Measure] = frozenset()

    @property
    def may_keep(self) -> bool:
        """Returns whether a call may leave everything as it was, after a look at the values."""
        return self.skips_nonfinite or self.weighted

    @property
    def is_plain(self) -> bool:
        """Returns whether the function runs once, on the complete batch, and returns its loss without a weight."""
        return self.microbatches == 1 and not self.weighted

    @classmethod
    def of(
        cls,
        fn: Callable[..., Any],
        microbatches: object,
        weighted: bool,
        whole_argnames: str | Sequence[str],
        nonfinite: str,
        measure: object = False,
    ) -> Training:
        """Returns the options of a train step on a function, checked.

        Raises:
          DeclarationError: a number of microbatches that is not a positive integer; a parameter that the function does
            not have; another word for `nonfinite`; something that is not measured.
        """
        parts = whole_number(microbatches, 1)
        if parts is None:
            raise DeclarationError(
                f"microbatches={microbatches!r} is not a number of parts.",
                hint="microbatches=8  # 1 is the whole batch",
            )
        whole = chosen_parameters(fn, {"whole_argnames": whole_argnames}, "whole")
        if nonfinite not in get_args(NonFinite):
            raise DeclarationError(f"nonfinite={nonfinite!r} is not one of 'write', 'skip'.", hint="nonfinite='skip'")
        return cls(parts, weighted, whole, nonfinite == "skip", _measures(measure))


def _measures(given: object) -> frozenset[Measure]:
    """Returns what `measure=` names: all for True, nothing for False."""
    if isinstance(given, bool):
        return frozenset(MEASURES if given else ())
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        names = (given,)
    names = list(names)
    unknown = [name for name in names if name not in get_args(Measure)]
    if unknown:
        raise DeclarationError(
            f"measure={given!r}: {unknown[0]!r} is not one of {', '.join(map(repr, get_args(Measure)))}.",
            hint="measure=('grads', 'updates')  # True for everything",
        )
    return frozenset(names)


# The options of a step that does none of this.
PLAIN = Training()
