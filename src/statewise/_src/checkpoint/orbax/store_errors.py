"""What an object store says when it refuses a request, in words."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from statewise.errors import RestoreError

__all__ = ["StoreError", "reads", "said", "store_errors", "unreadable"]

# TensorStore's text of an error: the name of a status, what happened, and facts in brackets.
_STATUS = re.compile(r"[A-Z_]{2,}: ")
_FACT = re.compile(r" \[([a-z_\-]+)='((?:[^'\\]|\\.)*)'\]")
# The statuses that say something of the object: there is none, or none of its bytes are in this range.  All others are
# refusals, for who asked, for how often, or for a token that has expired (400, in S3).
_OF_THE_OBJECT = (404, 416)
_CREDENTIALS = re.compile("token|credential|signature|access ?key", re.IGNORECASE)
# How TensorStore says without a status that it got no answer, or did not ask: its own names, and that it gave up.
_UNANSWERED = re.compile(
    r"(UNAUTHENTICATED|PERMISSION_DENIED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED): "
    r"|retry attempts failed|CURL error"
)


class StoreError(OSError):
    """What a store said when it refused a request, or what kept the request from it.

    Attributes:
      status: the number of the HTTP status; None if there was no answer.
      strerror: it in words.
      is_refusal: whether the store did not give what it may well have, so that nothing need be corrupted.
    """

    def __init__(self, text: str, status: int | None = None, is_refusal: bool = True) -> None:
        super().__init__(errno.EIO, text)
        self.status = status
        self.is_refusal = is_refusal

    @property
    def hint(self) -> str:
        """Returns what may help, in words."""
        # S3 answers 400 to a token that has expired.
        if self.status in (401, 403) or (self.status == 400 and _CREDENTIALS.search(self.strerror or "")):
            return "credentials with which this bucket may be read, listed and written"
        if self.status == 404:
            return "make the bucket first, or look at its name"
        return "try again; if that does not help, look at the endpoint and the bucket"


def said(error: BaseException) -> StoreError:
    """Returns as what the store said what TensorStore raises, or the library that Orbax has for the store."""
    if isinstance(error, StoreError):
        return error
    if not isinstance(error, ValueError):  # TensorStore has no other exception for what a store refuses
        return _said_by_library(error)
    text = str(error)
    facts = dict(_FACT.findall(text))
    words = _STATUS.sub("", _FACT.sub("", text).split(" [tensorstore_spec=")[0], count=1).strip()
    body = facts.get("http_response_body", "")
    if words.endswith("Unknown") and body:
        words = words.removesuffix("Unknown") + body
    code = facts.get("http_response_code", "")
    status = int(code) if code.isdecimal() else None
    shown = " ".join(words.split())[:300].rstrip(".")
    is_refusal = bool(_UNANSWERED.search(text)) if status is None else status not in _OF_THE_OBJECT
    return StoreError(f"the store said {code}: {shown}" if status else shown, status, is_refusal)


def _said_by_library(error: BaseException) -> StoreError:
    text = " ".join(str(error).split()).rstrip(".")
    if not isinstance(error, OSError):
        text = f"{type(error).__name__}: {text}"
    code = getattr(error, "code", None)
    status = 403 if isinstance(error, PermissionError) or "Forbidden" in text else code if type(code) is int else None
    answered = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return StoreError(text, status, answered if status is None else status not in _OF_THE_OBJECT)


def unreadable(path: object, error: StoreError) -> RestoreError:
    """Returns the error for something that a store does not give."""
    return RestoreError(f"{path} cannot be read: {error.strerror}.", hint=error.hint)


@contextlib.contextmanager
def reads(path: object) -> Iterator[None]:
    """Raises what a store does not give to a block as a `RestoreError` that says so."""
    try:
        yield
    except StoreError as error:
        raise unreadable(path, error) from error


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Raises what TensorStore raises in a block as a `StoreError`."""
    try:
        yield
    except ValueError as error:
        raise said(error) from error
