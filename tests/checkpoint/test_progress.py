"""What is shown of a long write: a bar in a terminal, lines in a log, nothing in a pipe or for what is small."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from statewise._src.checkpoint.orbax import progress


def state_of(size: int) -> sw.State:
    model = nnx.Dict(w=nnx.Param(jnp.zeros(size)))
    return sw.plan(model).take(model)


@pytest.fixture
def all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LARGE", 1)


@pytest.mark.usefixtures("all_is_large")
def test_a_terminal_has_a_bar_that_ends_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sw.save(tmp_path / "saved", state_of(1000))
    out, err = capsys.readouterr()
    assert out == ""
    assert "writing" in err
    assert "4.0/4.0 kB" in err


@pytest.mark.parametrize("name", ["converted.safetensors", "converted"])
@pytest.mark.usefixtures("all_is_large")
def test_a_conversion_has_one_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sw.save(tmp_path / "saved", state_of(1000))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sw.convert(tmp_path / "saved", tmp_path / name, to=name.partition(".")[2] or "orbax")
    assert "4.0/4.0 kB" in capsys.readouterr().err


@pytest.mark.usefixtures("all_is_large")
def test_a_pipe_gets_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sw.save(tmp_path / "saved", state_of(1000))
    sw.convert(tmp_path / "saved", tmp_path / "converted.safetensors")
    assert capfd.readouterr() == ("", "")


def test_what_is_small_gets_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sw.save(tmp_path / "saved", state_of(1000))
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("all_is_large")
def test_a_log_gets_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE", 0.0)
    monkeypatch.setattr(progress, "LOOK", 0.001)
    (tmp_path / "part").write_bytes(bytes(3_000_000))
    with caplog.at_level(logging.INFO, "statewise"), progress.growing("writing it", 6_000_000, lambda: [tmp_path]):
        while not caplog.messages:
            time.sleep(0.001)
    assert caplog.messages[0] == "writing it: 3 of 6 MB"
    assert caplog.messages[-1] == "writing it: 6 of 6 MB"


@pytest.mark.usefixtures("all_is_large")
def test_a_failed_write_ends_the_bar_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with pytest.raises(OSError, match="full"), progress.growing("writing it", 8000, lambda: [tmp_path]):
        raise OSError("full")
    err = capsys.readouterr().err
    assert "writing it" in err
    assert "8.0/8.0" not in err
