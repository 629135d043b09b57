"""Fixtures: object stores that run on loopback, started when a test first asks for one.

    def test_reads_what_it_wrote(stores: str) -> None:  # once on gs://, once on s3://
        sw.save(f"{stores}/step_1", state)

`gcs` and `s3` are the same for one store.  Each test has a bucket of its own, empty, and while it runs the environment
sends gcsfs, s3fs, TensorStore and programs that it starts (which inherit `os.environ`) to the emulator.  The servers
are one for each worker, and end with it.

Everything goes through a proxy, which a test that asks for `proxy` can have go wrong:

    def test_is_patient(stores: str, proxy: Proxy) -> None:
        proxy.faults = [refuse(503, share=0.3), delay(0.02)]
        sw.save(f"{stores}/step_1", state)
        assert proxy.hits
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

import gcs_server as google
import s3_server as amazon
import writers
from proxy import Proxy

numbers = itertools.count(1)


@pytest.fixture(scope="session")
def gcs_proxy() -> Iterator[Proxy]:
    """The proxy before a GCS emulator."""
    program = google.binary()
    if isinstance(program, str):
        pytest.skip(program)
    with google.gcs_server() as proxy:
        yield proxy


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[Proxy]:
    """The proxy before an S3 emulator."""
    if amazon.missing():
        pytest.skip(amazon.missing())
    with amazon.s3_server() as proxy:
        yield proxy


@pytest.fixture
def gcs(gcs_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on a GCS emulator: `gs://bucket-1`."""
    name = f"bucket-{next(numbers)}"
    google.create_bucket(gcs_proxy.url, name)
    set_environment(google.environment(gcs_proxy.url), monkeypatch)
    yield f"gs://{name}"
    gcs_proxy.reset()


@pytest.fixture
def s3(s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket on an S3 emulator: `s3://bucket-1`."""
    name = f"bucket-{next(numbers)}"
    amazon.create_bucket(s3_proxy.url, name)
    set_environment(amazon.environment(s3_proxy.url), monkeypatch)
    yield f"s3://{name}"
    s3_proxy.reset()


@pytest.fixture(params=["gcs", "s3"])
def stores(request: pytest.FixtureRequest) -> str:
    """An empty bucket on each object store: `gs://bucket-1`, then `s3://bucket-2`."""
    return request.getfixturevalue(request.param)


def make_buckets(name: str, request: pytest.FixtureRequest) -> None:
    """Makes a bucket of this name on each store, and sends this test to them."""
    for fixture, server in (("gcs", google), ("s3", amazon)):
        request.getfixturevalue(fixture)
        server.create_bucket(request.getfixturevalue(f"{fixture}_proxy").url, name)


@pytest.fixture
def proxy(stores: str, request: pytest.FixtureRequest) -> Proxy:
    """The proxy before the store of a test that has `stores`."""
    return request.getfixturevalue("gcs_proxy" if stores.startswith("gs:") else "s3_proxy")


@pytest.fixture(scope="session")
def store_writers(gcs_proxy: Proxy, s3_proxy: Proxy) -> Iterator[writers.Template]:
    """A template of writers to both stores, which are killed."""
    with writers.template(google.environment(gcs_proxy.url) | amazon.environment(s3_proxy.url)) as template:
        yield template


def set_environment(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets variables until the end of a test."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
