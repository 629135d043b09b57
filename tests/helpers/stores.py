"""Fixtures: object stores that run on loopback, started when a test first asks for one.

    def test_reads_what_it_wrote(stores: str) -> None:  # once on gs://, once on s3://
        sw.save(f"{stores}/step_1", state)

`gcs` and `s3` are the same for one store.  Each test has a bucket of its own, empty, and while it runs the environment
sends gcsfs, s3fs, TensorStore and programs that it starts (which inherit `os.environ`) to the emulator.  The servers
are one for each worker, and end with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

import gcs_server as google
import s3_server as amazon

numbers = itertools.count(1)


@pytest.fixture(scope="session")
def gcs_url() -> Iterator[str]:
    """The HTTP URL of a GCS emulator."""
    program = google.binary()
    if isinstance(program, str):
        pytest.skip(program)
    with google.gcs_server() as url:
        yield url


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The HTTP URL of an S3 emulator."""
    if amazon.missing():
        pytest.skip(amazon.missing())
    with amazon.s3_server() as url:
        yield url


@pytest.fixture
def gcs(gcs_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket on a GCS emulator: `gs://bucket-1`."""
    name = f"bucket-{next(numbers)}"
    google.create_bucket(gcs_url, name)
    set_environment(google.environment(gcs_url), monkeypatch)
    return f"gs://{name}"


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket on an S3 emulator: `s3://bucket-1`."""
    name = f"bucket-{next(numbers)}"
    amazon.create_bucket(s3_url, name)
    set_environment(amazon.environment(s3_url), monkeypatch)
    return f"s3://{name}"


@pytest.fixture(params=["gcs", "s3"])
def stores(request: pytest.FixtureRequest) -> str:
    """An empty bucket on each object store: `gs://bucket-1`, then `s3://bucket-2`."""
    return request.getfixturevalue(request.param)


def set_environment(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets variables until the end of a test."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
