"""An object store that is slow, throttles, drops connections, truncates, and reorders.

Whatever it does: a save is complete or raises `SaveError`, a restore has the saved values or raises, an error says what
the store said, retries end, and what was complete before still restores.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

import numbered
import statewise as sw
from damaging import words
from proxy import Fault, Proxy, delay, drop_answer, drop_before_answer, drop_request, flip, hold, refuse, truncate

RETRIES = "STATEWISE_STORE_RETRIES"

# Through each of these a client comes that repeats what failed.
PASSING: dict[str, Sequence[Fault]] = {
    "slow": [delay(0.01)],
    "throttled, 429": [refuse(429, share=0.2)],
    "throttled, 503": [refuse(503, share=0.2)],
    "throttled, and says for how long": [refuse(503, retry_after=1, first=2), refuse(429, retry_after=1, first=1)],
    "drops what is sent": [drop_request(0.5, share=0.2)],
    "does what it is asked, and does not say so": [drop_before_answer(share=0.2)],
    "drops what is read": [drop_answer(0.5, share=0.2)],
    "reorders": [hold(3, share=0.5)],
    "all of it": [
        delay(0.005, share=0.2),
        refuse(429, share=0.05),
        refuse(503, share=0.05),
        drop_request(0.3, share=0.05),
        drop_before_answer(share=0.05),
        drop_answer(0.9, share=0.05),
        hold(2, share=0.2),
    ],
}


def is_step(path: str, number: int) -> bool:
    """Whether there is a checkpoint, which then has to be right; if there is none, the error says so."""
    try:
        restored, report = sw.restore(path, numbered.plan().abstract())
    except sw.RestoreError as error:
        assert "is not a checkpoint" in error.message or "no checkpoint" in error.message, error
        return False
    assert report.ok
    assert words(restored) == words(numbered.state(number))
    return True


@pytest.mark.parametrize("fault", PASSING)
def test_a_save_and_a_restore_come_through(fault: str, stores: str, proxy: Proxy) -> None:
    proxy.faults = PASSING[fault]
    sw.save(f"{stores}/step_1", numbered.state(1))
    assert proxy.hits
    proxy.hits = 0
    assert is_step(f"{stores}/step_1", 1)
    assert proxy.hits
    proxy.faults = ()
    assert is_step(f"{stores}/step_1", 1)
