"""`refused`: a block must raise one of Statewise's errors, and all that the error says is compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pytest

import statewise as sw


@contextlib.contextmanager
def refused(
    cls: type[sw.StatewiseError],
    message: str,
    *,
    hint: str | None,
    leaves: Sequence[str] = (),
    kind: str | None = None,
) -> Iterator[pytest.ExceptionInfo[sw.StatewiseError]]:
    """Asserts class, fact, every leaf's line (path, type, shape, dtype, kind, note), kind and hint, all exactly."""
    with pytest.raises(cls) as caught:
        yield caught
    error = caught.value
    assert type(error) is cls
    assert error.message == message
    assert [str(leaf) for leaf in error.leaves] == list(leaves)
    assert error.kind == kind
    assert error.hint == hint
    shown = str(error)
    assert shown.startswith(message)
    assert all(line in shown for line in leaves[:50])
    assert hint is None or hint.splitlines()[-1] in shown
