"""What a save writes is on the disk when it returns; if the disk does not take it, nothing of it is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
import pytest

import statewise as sw
from checkpoint_models import number_of, numbered
from refusals import refused
from statewise._src.checkpoint import temporary
from statewise._src.checkpoint.orbax import epath
from statewise._src.checkpoint.orbax.flush import flush

HINT = "free some space, or choose a directory that can be written to"
WRITE: dict[str, Callable[[Path], object]] = {
    "saved": lambda path: sw.save(path, numbered(2)),
    "plain": lambda path: sw.convert({"a": numbered(2)["variables"]["leaves"]["a"]}, path, to="orbax"),
    "a.safetensors": lambda path: sw.convert({"a": numbered(2)["variables"]["leaves"]["a"]}, path, to="safetensors"),
}


def broken(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on the disk takes everything but the names in a directory."""
    fsync = os.fsync

    def fails(handle: int) -> None:
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fails)


@pytest.mark.parametrize("name", WRITE)
def test_a_name_that_the_disk_does_not_take_is_taken_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, tmp_path)
    said = f"{tmp_path / name} could not be written: Input/output error. Nothing of it is left."
    with refused(sw.SaveError, said, hint=HINT):
        WRITE[name](tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITE)
def test_a_name_that_cannot_be_taken_back_is_said_to_be_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes neither the name nor that it is taken back: what has the name is complete."""
    broken(monkeypatch, tmp_path)
    final, rename, unlink = tmp_path / name, os.rename, os.unlink

    def is_final(path: Any) -> None:
        if os.fspath(path) == str(final):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", lambda path, target: (is_final(path), rename(path, target)))
    monkeypatch.setattr(os, "unlink", lambda path, **options: (is_final(path), unlink(path, **options)))
    said = (
        f"{final} is complete, but the disk has not taken its name, so a power cut can remove it: Input/output error."
    )
    with refused(sw.SaveError, said, hint="save again, to another path"):
        WRITE[name](final)
    assert list(tmp_path.iterdir()) == [final]
    assert sw.inspect(final)


@pytest.mark.parametrize("name", WRITE)
def test_what_cannot_be_removed_is_not_said_to_be_gone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails and is then mounted to be read only, as Linux does."""
    fsync, unlink = os.fsync, os.unlink

    def fails(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", lambda handle: fails(errno.EIO))
    monkeypatch.setattr(os, "unlink", lambda path, **options: fails(errno.EROFS))
    with pytest.raises(sw.SaveError) as caught:
        WRITE[name](tmp_path / name)
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "unlink", unlink)
    assert left.name.startswith(f".{name}.tmp-")
    assert caught.value.message == (
        f"{tmp_path / name} could not be written: Input/output error. "
        f"What it has written is left in {left}: Read-only file system."
    )
    assert caught.value.hint == HINT


def test_what_a_failed_check_leaves_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside errors that are not the disk's."""

    def fails(*_: object) -> None:
        monkeypatch.setattr(temporary.shutil, "rmtree", busy)
        raise sw.StructureError("It is donated.")

    def busy(path: Path, *, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr("statewise._src.checkpoint.orbax.state_writer.StateWriter.finish", fails)
    with pytest.raises(sw.StructureError) as caught:
        sw.save(tmp_path / "saved", numbered(1))
    (left,) = tmp_path.iterdir()
    assert caught.value.__notes__ == [f"What it has written is left in {left}: Device or resource busy."]


def test_a_conversion_that_cannot_clear_up_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(temporary.shutil, "rmtree", busy)
    WRITE["plain"](tmp_path / "plain")
    (left,) = tmp_path.glob(".*")
    assert caplog.messages == [f"{tmp_path / 'plain'} is complete, but {left} is left: Device or resource busy"]


def unlisted(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """From now on no directory of arrays can be listed."""
    scandir = os.scandir

    def fails(path: Any = ".") -> Any:
        if os.path.basename(os.fspath(path)) == "d":
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)


def test_files_that_cannot_be_listed_are_not_taken_for_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved" / "d").mkdir(parents=True)
    (tmp_path / "saved" / "d" / "array").write_text("")
    with monkeypatch.context() as patch:
        unlisted(patch, errno.EMFILE)
        with pytest.raises(OSError, match="Too many open files"):
            flush(tmp_path / "saved")
        unlisted(patch, errno.ENOENT)
        flush(tmp_path / "saved")  # another process has renamed it since it was seen
    flush(tmp_path / "gone")
    unlisted(monkeypatch, errno.EIO)
    said = f"A step could not be written to {tmp_path / 'run'}: Input/output error. Earlier steps are complete."
    with sw.Checkpoints(tmp_path / "run", asynchronous=False) as checkpoints, refused(sw.SaveError, said, hint=HINT):
        checkpoints.save(1, numbered(1))
    assert checkpoints.steps == ()


def test_another_process_makes_the_same_folder_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two runs do that write into one new folder: it appears right after this one has looked."""
    is_dir, appeared = Path.is_dir, []

    def looked(path: Path, **options: Any) -> bool:
        found = is_dir(path, **options)
        if not found and path.name == "new":
            os.mkdir(path)
            appeared.append(path)
        return found

    monkeypatch.setattr(Path, "is_dir", looked)
    sw.save(tmp_path / "new" / "run", numbered(1))
    assert appeared == [tmp_path / "new"]
    assert number_of(sw.restore(tmp_path / "new" / "run", numbered(2))[0]) == 1


@pytest.mark.parametrize("there", ["a file", "a link to nothing"])
def test_what_is_in_the_way_of_a_folder_is_not_a_directory(tmp_path: Path, there: str) -> None:
    (tmp_path / "new").write_text("mine") if there == "a file" else (tmp_path / "new").symlink_to(tmp_path / "gone")
    said = f"{tmp_path / 'new' / 'run'} could not be written: Not a directory. Nothing of it is left."
    with refused(sw.SaveError, said, hint=HINT):
        sw.save(tmp_path / "new" / "run", numbered(1))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("options", [None, ocp.v1.training.Checkpointer], ids=["first", "newer"])
def test_a_step_whose_name_the_disk_does_not_take_is_no_step(
    options: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        checkpoints.save(1, numbered(1))
    with monkeypatch.context() as patch:
        checkpoints = sw.Checkpoints(tmp_path, max_to_keep=1 if options is None else None, options=options)
        broken(patch, tmp_path)
        checkpoints.save(2, numbered(2))
        said = f"A step could not be written to {tmp_path}: Input/output error. Earlier steps are complete."
        with refused(sw.SaveError, said, hint=HINT):
            checkpoints.wait()
    with sw.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == (1,)
        checkpoints.save(2, numbered(2))
        assert number_of(checkpoints.restore(numbered(0)).state) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("options", [None, ocp.v1.training.Checkpointer], ids=["first", "newer"])
def test_half_a_deleted_step_stops_no_save(options: object, tmp_path: Path) -> None:
    with sw.Checkpoints(tmp_path, options=options) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, numbered(step))
    for gone in ("_CHECKPOINT_METADATA", "commit_success.txt", "state/manifest.ocdbt"):
        (tmp_path / "1" / gone).unlink()
    with sw.Checkpoints(tmp_path, max_to_keep=2, options=options) as checkpoints:
        assert checkpoints.steps == (1, 2)
        with pytest.raises(sw.CorruptedError, match=r"manifest\.ocdbt is missing"):
            checkpoints.restore(numbered(0), step=1)
        checkpoints.save(3, numbered(3))
        checkpoints.wait()
        assert checkpoints.steps == (2, 3)


def test_what_a_killed_conversion_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    left = tmp_path / f".plain.tmp-{temporary._host()}-{process.pid}.5-00000005"
    (left / "converted").mkdir(parents=True)
    WRITE["plain"](tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


def test_what_orbax_has_not_finished_is_called_as_orbax_calls_it() -> None:
    assert epath._TEMPORARY == ocp.path.atomicity.TMP_DIR_SUFFIX
