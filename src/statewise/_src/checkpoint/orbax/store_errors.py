"""What an object store says when it refuses a request, in words."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from statewise.errors import RestoreError

__all__ = ["StoreError", "said", "store_errors", "unreadable"]

# TensorStore's text of an error: the name of a status, what happened, and facts in brackets.
_STATUS = re.compile(r"[A-Z_]{2,}: ")
_FACT = re.compile(r" \[([a-z_\-]+)='((?:[^'\\]|\\.)*)'\]")
# The statuses of requests that were refused for who asked, or for how often; and how TensorStore says that it gave up.
_REFUSALS, _GIVEN_UP = (401, 403, 407, 408, 429), "retry attempts failed"


class StoreError(OSError):
    """What a store said when it refused a request, or what kept the request from it.

    Attributes:
      status: the number of the HTTP status; None if there was no answer.
      strerror: it in words.
    """

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(errno.EIO, text)
        self.status = status

    @property
    def is_refusal(self) -> bool:
        """Returns whether the store did not give what it may well have, so that nothing need be corrupted."""
        return self.status in _REFUSALS or (self.status or 0) >= 500 or _GIVEN_UP in (self.strerror or "")

    @property
    def hint(self) -> str:
        """Returns what may help, in words."""
        if self.status in (401, 403):
            return "credentials with which this bucket may be read, listed and written"
        if self.status == 404:
            return "make the bucket first, or look at its name"
        return "try again; if that does not help, look at the endpoint and the bucket"


def said(error: BaseException) -> StoreError:
    """Returns an exception of TensorStore as what the store said."""
    if isinstance(error, StoreError):
        return error
    text = str(error)
    facts = dict(_FACT.findall(text))
    words = _STATUS.sub("", _FACT.sub("", text).split(" [tensorstore_spec=")[0], count=1).strip()
    body = facts.get("http_response_body", "")
    if words.endswith("Unknown") and body:
        words = words.removesuffix("Unknown") + body
    code = facts.get("http_response_code", "")
    status = int(code) if code.isdecimal() else None
    shown = " ".join(words.split())[:300].rstrip(".")
    return StoreError(f"the store said {code}: {shown}" if status else shown, status)


def unreadable(path: object, error: StoreError) -> RestoreError:
    """Returns the error for something that a store does not give."""
    return RestoreError(f"{path} cannot be read: {error.strerror}.", hint=error.hint)


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Raises what TensorStore raises in a block as a `StoreError`."""
    try:
        yield
    except ValueError as error:  # the only exception that TensorStore has for what a store refuses
        raise said(error) from error
