"""What goes wrong in an object store, and what an error says of it: for tests of several verbs."""

from __future__ import annotations

import re
from collections.abc import Sequence

import statewise as sw
from proxy import REFUSAL, Fault, delay, drop_answer, drop_before_answer, drop_request, hold, refuse

# How often a request is repeated, as a number.
RETRIES = "STATEWISE_STORE_RETRIES"

# Through each of these a client comes that repeats what failed.
PASSING: dict[str, Sequence[Fault]] = {
    "slow": [delay(0.01)],
    "throttled, 429": [refuse(429, first=1), refuse(429, share=0.2)],
    "throttled, 503": [refuse(503, first=1), refuse(503, share=0.2)],
    "throttled, and says for how long": [refuse(503, retry_after=1, first=2), refuse(429, retry_after=1, first=1)],
    "drops what is sent": [drop_request(0.5, first=1), drop_request(0.5, share=0.2)],
    "does what it is asked, and does not say so": [drop_before_answer(first=1), drop_before_answer(share=0.2)],
    "drops what is read": [drop_answer(0.5, first=1), drop_answer(0.5, share=0.2)],
    "reorders": [hold(3, share=0.5)],
    "all of it": [
        delay(0.005, share=0.2),
        refuse(429, share=0.05),
        refuse(503, share=0.05),
        drop_request(0.3, share=0.05),
        drop_before_answer(share=0.05),
        drop_answer(0.9, share=0.05),
        hold(2, share=0.2),
        delay(0.001),
    ],
}


def check_says_what_the_store_said(error: object, path: str) -> None:
    """It names the path, and what was answered, or what kept the answer from arriving."""
    assert isinstance(error, (sw.SaveError, sw.RestoreError)), error
    assert path in error.message, error
    assert re.search(rf"the store said (429|503|403): |CURL error |{REFUSAL}", error.message), error
