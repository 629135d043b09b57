"""A store that accepts connections and never answers: each request ends, and the error says why."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import gcs_server
import s3_server
from started import started
from statewise._src.checkpoint.orbax.stores import StorePath, spec_of_store
from stores import set_environment

SILENCE = "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_a_store_that_never_answers(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:  # the system accepts; nobody reads
        here = f"http://127.0.0.1:{server.getsockname()[1]}"
        set_environment(gcs_server.environment(here) | s3_server.environment(here), monkeypatch)
        set_environment({SILENCE: "2", "STATEWISE_STORE_RETRIES": "0"}, monkeypatch)
        with started("silent_store.py", tmp_path / "out", 1, url) as program:
            program.check_ended_well()
            lines = [line for line in program.said().splitlines() if "Error: " in line and url in line]
    why = "All 0 retry attempts failed: CURL error Timeout was reached: Operation too slow"
    assert [line.partition(". ")[0] for line in lines] == [
        f"SaveError: {url} could not be written: {why}",
        f"RestoreError: {url} cannot be read: {why}",
        f"RestoreError: {url} cannot be read: {why}",
    ]


def test_how_long_a_store_may_be_silent_is_set_for_whoever_has_not_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SILENCE, raising=False)
    spec_of_store(StorePath("gs://bucket/run"))
    assert os.environ[SILENCE] == "30"
    monkeypatch.setenv(SILENCE, "7")
    spec_of_store(StorePath("gs://bucket/run"))
    assert os.environ[SILENCE] == "7"
