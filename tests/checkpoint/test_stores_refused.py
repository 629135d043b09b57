"""What is refused on gs:// and s3://: by the store, because of the path, or because it is not done there."""

from __future__ import annotations

import pathlib
from pathlib import Path

import numpy as np
import pytest

import statewise as sw
from proxy import Proxy, drop_answer, drop_before_answer, refuse
from refusals import refused
from statewise._src.checkpoint.orbax.stores import StorePath
from stored_objects import WHOLE, objects, small, value

# --- what a store refuses --------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are repeated twice, and no more."""
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "2")


MAY = "credentials with which this bucket may be read, listed and written"
AGAIN = "try again; if that does not help, look at the endpoint and the bucket"


def test_no_permission(stores: str, proxy: Proxy) -> None:
    sw.save(f"{stores}/run", small())
    proxy.faults = [refuse(403)]
    with pytest.raises(sw.SaveError, match=r"/other could not be written: the store said 403: .*\.") as caught:
        sw.save(f"{stores}/other", small())
    assert caught.value.hint == MAY
    for verb in (sw.inspect, lambda path: sw.restore(path, small()), lambda path: sw.diff(path, small())):
        with pytest.raises(sw.RestoreError, match=r"/run.* cannot be read: the store said 403: .*\.") as refusal:
            verb(f"{stores}/run")
        assert refusal.value.hint == MAY


def test_arrays_that_the_store_does_not_give_are_not_called_corrupted(
    stores: str, proxy: Proxy, impatient: None
) -> None:
    sw.save(f"{stores}/run", small())
    proxy.faults = [refuse(503, pattern="statewise-")]
    with pytest.raises(sw.RestoreError, match=r"/run cannot be read: the store said 503: All 2 retry") as caught:
        sw.restore(f"{stores}/run", small())
    assert caught.value.hint == AGAIN


def test_a_store_that_is_busy_for_a_moment(stores: str, proxy: Proxy) -> None:
    proxy.faults = [refuse(503, first=3), refuse(429, after=4, first=2), drop_answer(after=8, first=1)]
    sw.save(f"{stores}/run", small())
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 1


def test_a_store_that_is_busy_for_too_long(stores: str, proxy: Proxy, impatient: None) -> None:
    proxy.faults = [refuse(503)]
    with pytest.raises(sw.SaveError, match=r"/run could not be written: the store said 503: All 2 retry") as caught:
        sw.save(f"{stores}/run", small())
    assert caught.value.hint == AGAIN


def test_a_number_of_retries_that_is_none(stores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "often")
    why = "STATEWISE_STORE_RETRIES='often' is not a number"
    with pytest.raises(sw.SaveError, match=f"/run could not be written: {why}"):
        sw.save(f"{stores}/run", small())
    with refused(sw.RestoreError, f"{stores}/run cannot be read: {why}.", hint=AGAIN):
        sw.restore(f"{stores}/run", small())


@pytest.mark.parametrize("number", ["", "often"])
def test_the_number_of_retries_is_of_stores_only(number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", number)
    sw.save(tmp_path / "run", small())
    assert value(sw.restore(tmp_path / "run", small(0))[0]) == 1
    with sw.Checkpoints(tmp_path / "steps") as checkpoints:
        checkpoints.save(1, small())
    assert checkpoints.latest == 1


def test_no_number_of_retries_is_the_usual_one(stores: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATEWISE_STORE_RETRIES", "")
    sw.save(f"{stores}/run", small())
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 1


def test_no_bucket_of_this_name(stores: str) -> None:
    absent = f"{stores}-absent"
    with pytest.raises(sw.SaveError, match=r"-absent/run could not be written: the store said 404: ") as caught:
        sw.save(f"{absent}/run", small())
    assert caught.value.hint == "make the bucket first, or look at its name"
    with pytest.raises(sw.RestoreError, match=r"There is nothing at .*-absent/run|the store said 404: NoSuchBucket"):
        sw.restore(f"{absent}/run", small())


def test_a_manifest_whose_answer_is_lost(stores: str, proxy: Proxy) -> None:
    """The request is repeated, and meets the object that it has written itself."""
    proxy.faults = [drop_before_answer(methods=("PUT", "POST"), pattern=r"statewise\.json", first=1)]
    sw.save(f"{stores}/run", small())
    assert proxy.hits
    assert objects(f"{stores}/run") == WHOLE
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 1


def test_a_manifest_of_which_it_is_not_known_whether_it_was_written(stores: str, proxy: Proxy, impatient: None) -> None:
    proxy.faults = [drop_before_answer(methods=("PUT", "POST"), pattern=r"statewise\.json")]
    with pytest.raises(sw.SaveError, match=f"It is not known whether {stores}/run is complete: ") as caught:
        sw.save(f"{stores}/run", small())
    assert caught.value.hint == (f"sw.inspect({stores + '/run'!r}) says whether it is; if not, save again to this path")
    proxy.reset()
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 1  # it was


def test_what_orbax_needs_is_missing_if_the_store_ends_after_the_manifest(
    stores: str, proxy: Proxy, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults = [refuse(503, methods=("PUT", "POST"), pattern=r"run(/|%2F)_METADATA")]
    sw.save(f"{stores}/run", small())
    assert f"{stores}/run is complete, but not all that Orbax needs to read it is there: the store" in caplog.text
    proxy.reset()
    assert value(sw.restore(f"{stores}/run", small(0))[0]) == 1


# --- what is not a path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("gs://", "it does not name a bucket"),
        ("s3:///run", "it does not name a bucket"),
        ("gs://./run", "it does not name a bucket"),
        ("gs://No_Bucket!/run", "'No_Bucket!' is not the name of a bucket"),
        ("s3://No_Bucket!/run", "'No_Bucket!' is not the name of a bucket"),
        ("gs://bucket/a\nb", "no object can have a name below it (control characters, or too long)"),
    ],
)
def test_a_url_that_no_object_can_have(url: str, why: str) -> None:
    hint = "'gs://bucket/run/step_100', or 's3://bucket/run/step_100'"
    with refused(sw.SaveError, f"{url} cannot be a path: {why}.", hint=hint):
        sw.save(url, small())
    with refused(sw.RestoreError, f"{url} cannot be a path: {why}.", hint=hint):
        sw.restore(url, small())


def test_a_url_that_was_a_path_of_pathlib() -> None:
    said = "s3:/bucket/run is a URL without one of its slashes: a pathlib.Path cannot have two."
    hint = "the text of the URL, or an epath.Path: 's3://bucket/run'"
    with refused(sw.SaveError, said, hint=hint):
        sw.save(pathlib.Path("s3://bucket/run"), small())
    with refused(sw.RestoreError, said, hint=hint):
        sw.inspect(pathlib.Path("s3://bucket/run"))


def test_names_that_a_store_cannot_have() -> None:
    long = "gs://bucket/" + "x" * 1000
    said = (
        f"{long} cannot be written: of the 1024 bytes that a name in a store may have, it leaves 24 for the names of "
        "the objects below it, which take up to 100."
    )
    with refused(sw.SaveError, said, hint="a shorter path"):
        sw.save(long, small())
    text = "gs://bucket/\udcff"
    with refused(
        sw.RestoreError, f"{text!r} cannot be a path: it has characters that are not text.", hint="another path"
    ):
        sw.inspect(text)


def test_files_of_other_programs_in_a_store(stores: str) -> None:
    for name in ("theirs/model.safetensors", "one.safetensors", "notes.txt"):
        (StorePath(stores) / name).write_text("{}")
    copying = {"gs": "gcloud storage cp --recursive", "s3": "aws s3 cp --recursive"}[stores[:2]]
    for path in (f"{stores}/theirs", f"{stores}/one.safetensors"):
        name = path.rpartition("/")[2]
        said = f"{path} is in an object store, where files of other programs are not read."
        for verb in (sw.inspect, lambda path: sw.convert(path, None, to="orbax"), lambda path: sw.inspect([path])):
            with refused(sw.RestoreError, said, hint=f"copy it to a disk: {copying} {path} {name}"):
                verb(path)
    with refused(
        sw.CorruptedError,
        f"{stores}/theirs is not a checkpoint of Statewise: it has no statewise.json, but it holds model.safetensors.",
        hint=f"copy it to a disk: {copying} {stores}/theirs theirs",
    ):
        sw.restore(f"{stores}/theirs", small())
    with refused(
        sw.RestoreError,
        f"{stores}/notes.txt is not a checkpoint of Statewise, but a file.",
        hint=f"copy it to a disk, and give that: {copying} {stores}/notes.txt notes.txt",
    ):
        sw.restore(f"{stores}/notes.txt", small())
    for to in ("orbax", "safetensors"):
        with refused(
            sw.SaveError,
            f"{stores}/out is in an object store, where only checkpoints of Statewise are written.",
            hint="convert to a local path, and then copy the result",
        ):
            sw.convert({"a": np.ones(1)}, f"{stores}/out", to=to)


def test_a_plain_orbax_checkpoint_on_s3(s3: str) -> None:
    (StorePath(s3) / "theirs/_METADATA").write_text("{}")
    with refused(
        sw.RestoreError,
        f"{s3}/theirs is a plain Orbax checkpoint, and Orbax cannot read it from s3://.",
        hint=f"copy it to a disk: aws s3 cp --recursive {s3}/theirs theirs",
    ):
        sw.inspect(f"{s3}/theirs")
