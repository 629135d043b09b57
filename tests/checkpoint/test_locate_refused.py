"""Paths that cannot be used: refused in words before a byte is written or read, with what works instead."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

import statewise as sw
from odd_paths import (
    STATE,
    UNUSABLE,
    assert_works,
    state_of,
)
from refusals import refused

# --- refused -----------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Any], object]] = {
    "save": lambda path: sw.save(path, STATE),
    "orbax": lambda path: sw.convert(dict(STATE["params"]), path, to="orbax"),
    "linen": lambda path: sw.convert({"params": dict(STATE["params"])}, path, to="linen"),
    "statewise": lambda path: sw.convert({"params": dict(STATE["params"])}, path, target=STATE),
    "checkpoints": lambda path: sw.Checkpoints(path).close(),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("name", "why", "like"), UNUSABLE, ids=ascii)
def test_what_cannot_be_written_is_refused_and_what_is_proposed_works(
    tmp_path: pathlib.Path, write: str, name: str, why: str, like: str
) -> None:
    for path, proposed in ((tmp_path / name, tmp_path / like), (tmp_path / name / "x", tmp_path / like / "x")):
        with refused(
            sw.SaveError, f"{path} cannot be written: {why}.", hint=f"another path: {str(proposed)!r}"
        ) as error:
            WRITERS[write](path)
        assert not list(tmp_path.iterdir())
        WRITERS[write](eval(error.value.hint.removeprefix("another path: ")))
        assert proposed.is_dir()
        shutil.rmtree(tmp_path / like)


@pytest.mark.parametrize(("name", "why", "like"), UNUSABLE, ids=ascii)
def test_what_cannot_be_read_is_not_called_damaged_and_a_link_to_it_works(
    tmp_path: pathlib.Path, name: str, why: str, like: str
) -> None:
    sw.save(tmp_path / "ours", STATE)
    sw.convert({"params": dict(STATE["params"])}, tmp_path / "theirs", to="linen")
    for made, read in (("ours", assert_works), ("theirs", lambda path: sw.convert(path, None, to="linen"))):
        path = tmp_path / made / name / "x"
        (tmp_path / made).rename(tmp_path / "moved")
        path.parent.mkdir(parents=True)
        (tmp_path / "moved").rename(path)
        hint = (
            "give it another name, or a link that has one, and read that:\n"
            f"link = os.path.join(tempfile.mkdtemp(), 'checkpoint'); os.symlink({str(path)!r}, link)"
        )
        with refused(sw.RestoreError, f"{path} cannot be read: {why}.", hint=hint):
            read(path)
        scope: dict[str, Any] = {"os": os, "tempfile": tempfile}
        exec(hint.splitlines()[1], scope)
        read(scope["link"])


@pytest.mark.parametrize("first", ["gs", "s3", "az", "hf"])
def test_a_folder_at_the_root_that_is_taken_for_an_object_store(first: str) -> None:
    why = f"Orbax takes /{first}/ for {first}://, an object store"
    for write in WRITERS.values():
        with refused(
            sw.SaveError, f"/{first}/run cannot be written: {why}.", hint=f"another path: '/data/{first}/run'"
        ):
            write(f"/{first}/run")
    with pytest.raises(sw.RestoreError, match=f"/{first}/run cannot be read: {why}"):
        sw.restore(f"/{first}/run", STATE)


@pytest.mark.parametrize("name", ["x" * 256, "\u00e9" * 128])
def test_a_name_that_is_too_long_for_the_file_system(tmp_path: pathlib.Path, name: str) -> None:
    path = str(tmp_path / name)
    with refused(
        sw.SaveError, f"{path!r} cannot be a path: File name too long.", hint="sw.save('run/step_100', state)"
    ):
        sw.save(path, STATE)
    hint = "sw.convert(src, 'run/converted')"
    with refused(sw.SaveError, f"{path!r} cannot be a path: File name too long.", hint=hint):
        sw.convert(dict(STATE["params"]), path, to="safetensors")
    assert not list(tmp_path.iterdir())


def test_a_path_that_leaves_no_room_for_the_files_in_it(tmp_path: pathlib.Path) -> None:
    room = os.pathconf("/", "PC_PATH_MAX") - len(str(tmp_path))
    path = str(tmp_path) + f"/{'d' * 99}" * (room // 100)
    left = os.pathconf("/", "PC_PATH_MAX") - len(path)
    message = (
        f"{path} cannot be written: of the {len(path) + left} bytes that a path may have, it leaves {left} "
        "for the names of the files below it, which take up to 512."
    )
    for write in WRITERS.values():
        with refused(sw.SaveError, message, hint="a shorter path"):
            write(path)
    assert not list(tmp_path.iterdir())
    deep = str(tmp_path) + f"/{'d' * 99}" * ((room - 512) // 100)
    sw.save(deep, STATE)
    assert_works(deep)


def test_a_path_of_many_folders(tmp_path: pathlib.Path) -> None:
    """More of them than Python calls itself."""
    path = str(tmp_path) + "/d" * 1050
    try:
        sw.save(f"{path}/run", STATE)
        assert_works(f"{path}/run")
        with sw.Checkpoints(f"{path}/e/steps") as checkpoints:
            checkpoints.save(1, STATE)
        assert checkpoints.steps == (1,)
        sw.convert({"params": dict(STATE["params"])}, f"{path}/e/x.safetensors", to="safetensors")
    finally:
        while os.path.isdir(path) and path != str(tmp_path):  # pytest would call itself as often to remove them
            shutil.rmtree(path)
            path = os.path.dirname(path)


@pytest.mark.parametrize("path", ["a\0b", "\ud800", ""], ids=ascii)
def test_text_that_is_no_path(path: str) -> None:
    why = {"a\0b": "it has a null byte", "\ud800": "it has characters that no file name can have"}.get(path)
    message = f"{path!r} cannot be a path: {why}." if why else "'' is not a path."
    for write, hint in (
        (WRITERS["save"], "sw.save('run/step_100', state)"),
        (WRITERS["orbax"], "sw.convert(src, 'run/converted')"),
        (WRITERS["checkpoints"], "sw.Checkpoints('run/steps')"),
    ):
        with refused(sw.SaveError, message, hint=hint):
            write(path)
    for read in (lambda: sw.restore(path, STATE), lambda: sw.preview(path, STATE), lambda: sw.inspect(path)):
        with refused(sw.RestoreError, message, hint="sw.restore('run/step_100', target)"):
            read()
    with refused(sw.RestoreError, message, hint="sw.convert('run/checkpoint', dst)"):
        sw.convert(path, None, to="linen")


@pytest.mark.parametrize(
    ("url", "scheme", "like"), [("file:///data/run", "file", "/data/run"), ("run://3", "run", "./run://3")]
)
def test_a_url_that_is_neither_a_path_nor_a_store(url: str, scheme: str, like: str) -> None:
    for write in WRITERS.values():
        with refused(sw.SaveError, f"{url} is a URL, and {scheme}:// is not written.", hint=f"a path: {like!r}"):
            write(url)
    for read in (
        lambda: sw.restore(url, STATE),
        lambda: sw.convert(url, None, to="linen"),
        lambda: sw.diff(url, STATE),
    ):
        with refused(sw.RestoreError, f"{url} is a URL, and {scheme}:// is not read.", hint=f"a path: {like!r}"):
            read()


def test_the_path_that_is_proposed_for_what_looks_like_a_url_works(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sw.save("./run://3", STATE)
    assert_works("./run://3")
    assert_works(tmp_path / "run:" / "3")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (b"run", "bytes is not a path."),
        ("", "'' is not a path."),
        ("a\0b", "'a\\x00b' cannot be a path: it has a null byte."),
    ],
)
def test_what_is_no_path(path: Any, message: str) -> None:
    with refused(sw.SaveError, message, hint="sw.save('run/step_100', state)"):
        sw.save(path, state_of(a=jnp.ones(2)))


def test_a_name_that_is_too_long(tmp_path: pathlib.Path) -> None:
    with pytest.raises(sw.SaveError, match="File name too long"):
        sw.save(tmp_path / ("x" * 300), state_of(a=jnp.ones(2)))
