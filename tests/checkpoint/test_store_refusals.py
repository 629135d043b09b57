"""What a store refuses, in every verb that takes a path: an error of Statewise that says what the store said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import numbered
import statewise as sw
from proxy import Proxy, refuse
from statewise._src.checkpoint.orbax.store_errors import said
from stored_objects import small, value

MAY = "credentials with which this bucket may be read, listed and written"
NAMES = sw.Names({"a": "first", "b": "second"})


# Each takes a checkpoint in a store, and a folder on the disk with another one, `kept`.
READS: dict[str, Callable[[str, Path], object]] = {
    "inspect": lambda path, folder: sw.inspect(path),
    "inspect, by names": lambda path, folder: sw.inspect(path, names=NAMES),
    "preview": lambda path, folder: sw.preview(path, small()),
    "restore": lambda path, folder: sw.restore(path, small()),
    "restore, by names": lambda path, folder: sw.restore(path, small(), names=NAMES),
    "diff": lambda path, folder: sw.diff(path, small()),
    "diff, the other way round": lambda path, folder: sw.diff(folder / "kept", path),
    "convert": lambda path, folder: sw.convert(path, folder / "converted", target=small()),
    "convert, by names": lambda path, folder: sw.convert(path, folder / "converted", target=small(), names=NAMES),
    "convert, to safetensors": lambda path, folder: sw.convert(path, folder / "converted", to="safetensors"),
    "convert, only tried": lambda path, folder: sw.convert(path, None, to="orbax", dry_run=True),
    "report": lambda path, folder: sw.report(path),
    "Names.infer": lambda path, folder: sw.Names.infer(small().plan, path),
    "names.check": lambda path, folder: NAMES.check(small().plan, path),
    "a base": lambda path, folder: sw.save(folder / "over", numbered.state(1), only="params", base=path),
}
WRITES: dict[str, Callable[[str, Path], object]] = {
    "save": lambda path, folder: sw.save(f"{path}-new", small()),
    "convert": lambda path, folder: sw.convert(folder / "kept", f"{path}-new", target=small()),
}


@pytest.fixture
def kept(stores: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A checkpoint in a store; another is on the disk.  Requests are repeated once."""
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "1")
    sw.save(f"{stores}/run", small())
    sw.save(tmp_path / "kept", small())
    return f"{stores}/run"


@pytest.mark.parametrize("status", [400, 403, 503])
def test_every_verb_says_what_the_store_said(kept: str, status: int, proxy: Proxy, tmp_path: Path) -> None:
    proxy.faults = [refuse(status)]
    for verbs, error in ((READS, sw.RestoreError), (WRITES, sw.SaveError)):
        for name, verb in verbs.items():
            with pytest.raises(error) as caught:
                verb(kept, tmp_path)
            assert kept in caught.value.message, name
            assert f"the store said {status}: " in caught.value.message, name
            assert caught.value.hint, name
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}
    proxy.reset()
    assert value(sw.restore(kept, small(0))[0]) == 1


def test_a_token_that_expires_between_two_requests_corrupts_nothing(s3: str, s3_proxy: Proxy) -> None:
    """S3 answers 400 to an expired token."""
    sw.save(f"{s3}/run", small())
    for pattern in ("_METADATA", r"/d/", "manifest.ocdbt"):
        s3_proxy.faults = [refuse(400, pattern=f"statewise-.*{pattern}")]
        with pytest.raises(sw.RestoreError, match=r"/run cannot be read: the store said 400: .*ExpiredToken") as caught:
            sw.restore(f"{s3}/run", small(0))
        assert caught.value.hint == MAY
        assert s3_proxy.hits
        s3_proxy.reset()
    assert value(sw.restore(f"{s3}/run", small(0))[0]) == 1


def test_a_plain_checkpoint_that_the_store_does_not_give(gcs: str, gcs_proxy: Proxy, tmp_path: Path) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(f"{gcs}/plain", {"a": jnp.ones(3)})
    written = len(gcs_proxy.requests)
    sw.convert(f"{gcs}/plain", tmp_path / "first", to="safetensors")
    print("\n".join(map(str, gcs_proxy.requests[written:])))
    gcs_proxy.faults = [refuse(403, pattern="ocdbt|_METADATA", methods=("GET",))]
    with pytest.raises(sw.RestoreError, match="/plain cannot be read: the store said 403: "):
        sw.convert(f"{gcs}/plain", tmp_path / "converted", to="safetensors")


@pytest.mark.parametrize(
    ("text", "is_refusal"),
    [
        ("UNAUTHENTICATED: Failed to refresh the token", True),
        ("PERMISSION_DENIED: no [http_response_code='403']", True),
        ("INVALID_ARGUMENT: Unknown [http_response_code='400']", True),
        ("UNAVAILABLE: All 2 retry attempts failed: CURL error Timeout was reached", True),
        ("NOT_FOUND: no [http_response_code='404']", False),
        ("OUT_OF_RANGE: no [http_response_code='416']", False),
        ("DATA_LOSS: Expected 12 bytes, and got 3", False),
        ("FAILED_PRECONDITION: Error decoding the manifest", False),
    ],
)
def test_what_is_a_refusal(text: str, is_refusal: bool) -> None:
    assert said(ValueError(text)).is_refusal is is_refusal
