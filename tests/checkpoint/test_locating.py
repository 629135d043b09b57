"""Every path that the file system takes: a checkpoint works there, or is refused before a byte is written."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

import statewise as sw
from refusals import refused
from statewise import _compat
from statewise.checkpoint.locating import obstacle, short_name, spec_of
from strategies import Node

# What some library on the way takes for more than a letter of a name; all of these work.
NAMES = (
    *("run#3", "lr%3D0.1", "a%", "a?b", "a&b=c|d;e", "a b", " ", "'a'", '"', "a\nb", "a\tb", "\x01", "\x7f", "\u2028"),
    *("caf\u00e9", "cafe\u0301", "\u65e5\u672c", "\U0001f600", "-run", "--", "~", "a~", "$HOME", "${HOME}", "{a,b}"),
    *("[a]", "a[1", "[", "]", "[!a]", "*", "a*", "**", "?", "a:b", "a@b", "C:", "file:", ".hidden", "...", "a.", "..a"),
    *("x" * 255, "\u00e9" * 127, "a.safetensors", "ocdbt.process_0", "tmp", "a.orbax-checkpoint-tmp", "7", "a.__locks"),
)
# The same as paths of several of them.
PATHS = tuple("/".join(NAMES[at : at + 5]) for at in range(0, len(NAMES), 5))
# What TensorStore or Orbax cannot be given, why, and what is proposed instead.
BACKSLASH = "TensorStore takes a backslash for a slash"
LOCK = "TensorStore keeps names that end in .__lock for its own files"
BYTES = "it is not UTF-8, and TensorStore takes text alone"
URL = "Orbax takes 'gs:/' for the beginning of a URL"
UNUSABLE = (
    ("a\\b", BACKSLASH, "a_b"),
    ("\\", BACKSLASH, "_"),
    ("run.__lock", LOCK, "run_lock"),
    ("\udcff", BYTES, "_"),
    ("gs:", URL, "gs_"),
    ("my_gs:", URL, "my_gs_"),
)


def state_of(**values: Any) -> sw.State:
    model = Node(**{name: nnx.Param(value) for name, value in values.items()})
    return sw.plan(model).take(model)


STATE = state_of(w=jnp.arange(6.0).reshape(2, 3), b=jnp.ones(3))


def assert_kept(state: sw.State) -> None:
    for name in ("w", "b"):
        assert np.array_equal(state["params"][name], STATE["params"][name])


def assert_works(path: Any) -> None:
    """All that reads a checkpoint of Statewise reads this one."""
    state, report = sw.restore(path, STATE.plan.abstract())
    assert report.ok
    assert_kept(state)
    assert sw.preview(path, STATE).ok
    assert sw.inspect(path)["params"].elements == 9
    assert not sw.diff(path, STATE).changed


# --- the law -----------------------------------------------------------------------------------------------------

# Names as a file system has them: bytes without a slash or null, which Python shows as text.
segments = st.one_of(
    st.sampled_from(NAMES + tuple(name for name, *_ in UNUSABLE)),
    st.text(max_size=80),
    st.binary(min_size=1, max_size=40).map(os.fsdecode),
).map(lambda text: text.replace("/", "_").replace("\0", "_"))


def is_name(text: str) -> bool:
    """Whether a file can be called this."""
    try:
        return text not in ("", ".", "..") and len(os.fsencode(text)) <= 255
    except UnicodeEncodeError:
        return False


@settings(max_examples=40)
@given(names=st.lists(segments.filter(is_name), min_size=1, max_size=3), layout=st.sampled_from(["named", "packed"]))
@example(names=["run#3", "step"], layout="named")
@example(names=["lr%3D0.1", "step"], layout="packed")
def test_a_checkpoint_works_under_any_path_or_is_refused_before_a_byte_is_written(
    names: list[str], layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("paths")
    path = os.path.join(root, *names)
    try:
        sw.save(path, STATE, layout=layout)
    except sw.SaveError:
        assert not list(root.iterdir())
        assert obstacle(path)[0]  # known, and not anything that went wrong
        return
    assert_works(path)
    assert os.listdir(os.path.dirname(path)) == [names[-1]]  # nothing is left beside it


@pytest.mark.parametrize("to", ["orbax", "linen", "safetensors", "statewise"])
@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_other_formats_work_under_any_path_too(tmp_path: pathlib.Path, path: str, to: str) -> None:
    made = tmp_path / path
    if to == "safetensors":
        made = made.with_name(f"{made.name[:200]}.safetensors")
    sw.convert({"params": dict(STATE["params"])}, made, to=to, target=STATE)
    assert sw.convert(made, None, to="linen", target=STATE).tree["params"]["w"][1, 2] == 5
    assert sw.inspect(made).total.elements == 9
    assert [entry.name for entry in made.parent.iterdir()] == [made.name]


@pytest.mark.parametrize("name", PATHS, ids=ascii)
def test_the_steps_of_a_run_work_under_any_path_too(tmp_path: pathlib.Path, name: str) -> None:
    with sw.Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save(3, STATE, metrics={"loss": 1.0}, arrays=ocp.args.PyTreeSave({"a": np.arange(3.0)}))
        checkpoints.wait()
        restored = checkpoints.restore(STATE.plan.abstract(), extra={"arrays": ocp.args.PyTreeRestore()})
        assert np.array_equal(restored.extra["arrays"]["a"], np.arange(3.0))
        assert_kept(restored.state)
        assert_works(checkpoints.path(3))
    with sw.Checkpoints(tmp_path / name) as checkpoints:
        assert checkpoints.steps == (3,)
        assert checkpoints.restore(STATE, extra="metrics").extra == {"metrics": {"loss": 1.0}}


# --- patterns ----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(name=segments.filter(is_name), others=st.lists(segments.filter(is_name), max_size=4))
@example(name="a*", others=["ab"])
@example(name="[ab]", others=["a"])
@example(name="a?", others=["ab"])
def test_a_path_is_a_pattern_of_itself_alone(
    name: str, others: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("patterns")
    for at, folder in enumerate({name, *others}):
        (root / folder).mkdir()
        (root / folder / f"process_{at}").touch()
        (root / folder / "other~").touch()
    there = _compat.epath(root / name)
    assert [path.name for path in there.glob("process_*")] == [
        path for path in os.listdir(root / name) if path.startswith("process_")
    ]
    assert sorted(path.name for path in there.iterdir()) == sorted(os.listdir(root / name))
    assert all(type(path) is type(there) for path in (*there.iterdir(), *there.glob("*"), there / "x", there.parent))


def test_a_run_takes_nothing_of_another_whose_name_fits_its_own(tmp_path: pathlib.Path) -> None:
    """Orbax merges what each process has written, which it finds by a pattern: `run*` would find `run2`'s."""
    other = state_of(w=jnp.zeros((2, 3)), b=jnp.zeros(3))
    begun = tmp_path / "run2/1.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp"
    sw.save(tmp_path / "saved", other)
    begun.mkdir(parents=True)
    (tmp_path / "saved").rename(begun / "ocdbt.process_9")
    with sw.Checkpoints(tmp_path / "run*") as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.wait()
        assert_kept(checkpoints.restore(STATE.plan.abstract()).state)


@pytest.mark.parametrize("name", ["[run]", "run*", "**", "a#b"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_item_in_a_manager_of_orbax_s_own_works_there_too(
    tmp_path: pathlib.Path, name: str, asynchronous: bool
) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(tmp_path / name, options=options) as manager:
        manager.save(1, args=ocp.args.Composite(state=sw.checkpointable(STATE)))
        manager.wait_until_finished()
        back = manager.restore(1, args=ocp.args.Composite(state=sw.checkpointable(STATE.plan.abstract())))
    assert_kept(back["state"])
    assert_works(tmp_path / name / "1" / "state")


def test_an_item_in_a_manager_of_orbax_s_own_is_refused_where_orbax_writes_elsewhere(tmp_path: pathlib.Path) -> None:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with (
        ocp.CheckpointManager(tmp_path / "a\\b", options=options) as manager,
        pytest.raises(sw.SaveError, match=f"cannot be written: {BACKSLASH}"),
    ):
        manager.save(1, args=ocp.args.Composite(state=sw.checkpointable(STATE)))
    assert not (tmp_path / "a").exists()


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
            sw.SaveError, f"{path} cannot be written: {why}.", mend=f"another path: {str(proposed)!r}"
        ) as error:
            WRITERS[write](path)
        assert not list(tmp_path.iterdir())
        WRITERS[write](eval(error.value.mend.removeprefix("another path: ")))
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
        mend = (
            "give it another name, or a link that has one, and read that:\n"
            f"link = os.path.join(tempfile.mkdtemp(), 'checkpoint'); os.symlink({str(path)!r}, link)"
        )
        with refused(sw.RestoreError, f"{path} cannot be read: {why}.", mend=mend):
            read(path)
        scope: dict[str, Any] = {"os": os, "tempfile": tempfile}
        exec(mend.splitlines()[1], scope)
        read(scope["link"])


@pytest.mark.parametrize("first", ["gs", "s3", "az", "hf"])
def test_a_folder_at_the_root_that_is_taken_for_an_object_store(first: str) -> None:
    why = f"Orbax takes /{first}/ for {first}://, an object store"
    for write in WRITERS.values():
        with refused(
            sw.SaveError, f"/{first}/run cannot be written: {why}.", mend=f"another path: '/data/{first}/run'"
        ):
            write(f"/{first}/run")
    with pytest.raises(sw.RestoreError, match=f"/{first}/run cannot be read: {why}"):
        sw.restore(f"/{first}/run", STATE)


@pytest.mark.parametrize("name", ["x" * 256, "\u00e9" * 128])
def test_a_name_that_is_too_long_for_the_file_system(tmp_path: pathlib.Path, name: str) -> None:
    path = str(tmp_path / name)
    with refused(
        sw.SaveError, f"{path!r} cannot be a path: File name too long.", mend="sw.save('run/step_100', state)"
    ):
        sw.save(path, STATE)
    mend = "sw.convert(src, 'run/converted')"
    with refused(sw.SaveError, f"{path!r} cannot be a path: File name too long.", mend=mend):
        sw.convert(dict(STATE["params"]), path, to="safetensors")
    assert not list(tmp_path.iterdir())


def test_a_path_that_leaves_no_room_for_the_files_in_it(tmp_path: pathlib.Path) -> None:
    room = os.pathconf("/", "PC_PATH_MAX") - len(str(tmp_path))
    path = str(tmp_path) + f"/{'d' * 99}" * (room // 100)
    left = os.pathconf("/", "PC_PATH_MAX") - len(path)
    message = (
        f"{path} cannot be written: of the {len(path) + left} bytes that a path may have it leaves {left} "
        "for the names of the files below it, which take up to 512."
    )
    for write in WRITERS.values():
        with refused(sw.SaveError, message, mend="a shorter path"):
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
    why = {"a\0b": "it has a null byte", "\ud800": "it has characters that no name of a file can have"}.get(path)
    message = f"{path!r} cannot be a path: {why}." if why else "'' is no path."
    for write, mend in (
        (WRITERS["save"], "sw.save('run/step_100', state)"),
        (WRITERS["orbax"], "sw.convert(src, 'run/converted')"),
        (WRITERS["checkpoints"], "sw.Checkpoints('run/steps')"),
    ):
        with refused(sw.SaveError, message, mend=mend):
            write(path)
    for read in (lambda: sw.restore(path, STATE), lambda: sw.preview(path, STATE), lambda: sw.inspect(path)):
        with refused(sw.RestoreError, message, mend="sw.restore('run/step_100', target)"):
            read()
    with refused(sw.RestoreError, message, mend="sw.convert('run/checkpoint', dst)"):
        sw.convert(path, None, to="linen")


@pytest.mark.parametrize(
    ("url", "scheme", "like"), [("file:///data/run", "file", "/data/run"), ("run://3", "run", "./run://3")]
)
def test_a_url_that_is_neither_a_path_nor_a_store(url: str, scheme: str, like: str) -> None:
    for write in WRITERS.values():
        with refused(sw.SaveError, f"{url} is a URL, and {scheme}:// is not written.", mend=f"a path: {like!r}"):
            write(url)
    for read in (
        lambda: sw.restore(url, STATE),
        lambda: sw.convert(url, None, to="linen"),
        lambda: sw.diff(url, STATE),
    ):
        with refused(sw.RestoreError, f"{url} is a URL, and {scheme}:// is not read.", mend=f"a path: {like!r}"):
            read()


def test_the_path_that_is_proposed_for_what_looks_like_a_url_works(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sw.save("./run://3", STATE)
    assert_works("./run://3")
    assert_works(tmp_path / "run:" / "3")


# --- up, along links, and from elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path], ids=["str", "pathlib", "epath"])
@pytest.mark.parametrize("path", ["run", "./run", "run/", "run/.", "a//run", "x/../run", "x/y/../../run"])
def test_relative_paths_of_any_class(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, path: str, kind: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sw.save(kind(path), STATE)
    assert_works(kind(path))
    assert os.listdir(tmp_path) == [path.split("/")[0] if path[0] == "a" else "run"]


def test_a_path_that_goes_up_from_a_link_is_where_the_file_system_has_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("real/deep")
    os.symlink("real/deep", "link")
    sw.save("link/../run", STATE)
    with sw.Checkpoints("link/../steps") as checkpoints:
        checkpoints.save(0, STATE)
    sw.convert({"params": dict(STATE["params"])}, "link/../plain", to="linen")
    assert sorted(os.listdir("real")) == ["deep", "plain", "run", "steps"]
    assert sorted(os.listdir()) == ["link", "real"]
    assert_works("link/../run")
    assert sw.inspect("link/../plain").total.elements == 9


def test_a_run_goes_on_where_it_began_when_the_process_goes_elsewhere(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with sw.Checkpoints("run#1") as checkpoints:
        for step in range(3):
            checkpoints.save(step, STATE, metrics={"loss": 0.5})
            os.chdir(tmp_path / "elsewhere")
        assert_kept(checkpoints.restore(STATE.plan.abstract(), extra="metrics").state)
    assert not os.listdir(tmp_path / "elsewhere")
    assert_works(tmp_path / "run#1" / "2")


def test_a_base_is_found_through_links_and_after_both_have_moved(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nnx.LoRA(2, 1, 3, base_module=nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    state = sw.plan(model).take(model)
    os.makedirs("data#1/runs")
    os.symlink("data#1/runs", "link")
    sw.save("data#1/base%20", state)
    os.symlink("data#1/base%20", "latest")
    sw.save("link/over", state, only="lora", base="latest")
    os.unlink("latest")
    os.symlink("data#1/runs/over", "mine")
    for path in ("link/over", "data#1/runs/over", "mine"):
        assert sw.restore(path, state.plan.abstract())[1].ok
    os.rename("data#1", "data#2")
    assert sw.restore("data#2/runs/over", state.plan.abstract())[1].ok


# --- names that become folders and keys --------------------------------------------------------------------------

taken = st.sampled_from(["statewise.json", "_CHECKPOINT_METADATA", "default", "self", "commit_success.txt", "state"])


@settings(max_examples=15)
@given(name=st.one_of(taken, segments, st.text(max_size=230)))
@example(name="~")
@example(name="a*")
@example(name="_METADATA")
@example(name="\ud800")
@example(name="x" * 200)
def test_an_extra_item_of_any_name_comes_back_or_is_refused_before_the_step_begins(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    extra = {"loss": 0.5}
    if name in ("force", "only", "base", "layout", "cast"):
        return
    with sw.Checkpoints(tmp_path_factory.mktemp("run")) as checkpoints:
        try:
            checkpoints.save(1, STATE, **{name: extra})
        except sw.SaveError:
            assert not os.listdir(checkpoints.directory)
            return
        checkpoints.wait()
        restored = checkpoints.restore(STATE.plan.abstract(), extra=name)
        assert restored.extra == {name: extra}
        assert_works(checkpoints.directory / "1")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("statewise.json", "that name is taken by Orbax or Statewise"),
        ("default", "that name is taken by Orbax or Statewise"),
        ("a.__lock", LOCK),
        ("\udcff", BYTES),
        ("x" * 201, "it has 201 bytes, and may have 200"),
    ],
    ids=ascii,
)
def test_an_extra_item_s_name_that_no_folder_can_have(tmp_path: pathlib.Path, name: str, why: str) -> None:
    with (
        sw.Checkpoints(tmp_path) as checkpoints,
        refused(sw.SaveError, f"An extra item cannot be called {name!r}: {why}.", mend="another name"),
    ):
        checkpoints.save(1, STATE, **{name: 1})


def test_an_extra_item_called_like_an_option_of_save_is_not_lost(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        message = "force={'loss': 1} is neither True nor False."
        with refused(sw.SaveError, message, mend="another name, for an extra item"):
            checkpoints.save(1, STATE, **{"force": {"loss": 1}})
        assert not os.listdir(tmp_path)


def test_an_extra_item_is_asked_for_by_its_name_and_not_by_a_path(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, STATE, metrics={"loss": step})
        checkpoints.wait()
        for name in ("../1/metrics", "metrics/", ".", ""):
            with refused(sw.RestoreError, f"Step 2 has no item {name!r}.", mend="one of: metrics, state"):
                checkpoints.restore(STATE, extra=name)


@settings(max_examples=20)
@given(keys=st.lists(st.one_of(segments, st.text(max_size=20)), min_size=1, max_size=3, unique=True))
@example(keys=["a.b", "a/b"])
@example(keys=["\u00e9", "e\u0301"])
@example(keys=[".", ".."])
def test_leaves_of_any_name_come_back(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("keys")
    held = {key: nnx.Param(jnp.full(2, float(at))) for at, key in enumerate(keys)}
    model = Node(held=nnx.data(held))
    plan = sw.plan(model)
    sw.save(root / "run", plan.take(model))
    restored, report = sw.restore(root / "run", plan.abstract())
    assert report.ok
    assert {key: float(restored["params"]["held"][key][0]) for key in keys} == {key: at for at, key in enumerate(keys)}


@pytest.mark.parametrize("to", ["safetensors", "linen"])
def test_a_leaf_whose_name_another_format_cannot_hold(tmp_path: pathlib.Path, to: str) -> None:
    model = Node(held=nnx.data({"\udcff": nnx.Param(jnp.ones(2))}))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "run", state)
    place = tmp_path / "made.safetensors"
    with refused(
        sw.RestoreError,
        f"{tmp_path / 'run'} does not become {place} ({to}): 1 leaf is in the way. Nothing was read or written.",
        leaves=["held/\udcff: Param(2,) float32  kind=params  (has a name that is not UTF-8)"],
        mend="give it another name: rename={'name in the source': 'another/path'}",
    ):
        sw.convert(tmp_path / "run", place, to=to)
    sw.convert(tmp_path / "run", place, to=to, rename={"held/\udcff": "held/a"})
    assert sw.inspect(place).total.elements == 2


# --- as TensorStore gets them ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("/a#b/c%20?d", {"driver": "file", "path": "/a#b/c%20?d/"}),
        ("gs://my-bucket/a#b/c%20?d", {"driver": "gcs", "bucket": "my-bucket", "path": "a#b/c%20?d/"}),
        ("gs://my-bucket", {"driver": "gcs", "bucket": "my-bucket", "path": ""}),
        ("s3://my-bucket/run/3", {"driver": "s3", "bucket": "my-bucket", "path": "run/3/"}),
    ],
)
def test_a_path_is_a_field_and_no_part_of_a_url(path: str, spec: dict[str, str]) -> None:
    made = spec_of(_compat.epath(path))
    assert made == spec
    # TensorStore's own reading of it: the fields come back, and its URL has them escaped.
    store = _compat.tensorstore().KvStore.Spec(made)
    assert {name: store.to_json().get(name, "") for name in spec} == spec
    assert "#" not in store.url
    assert "?" not in store.url


@given(name=segments.filter(is_name))
def test_a_long_name_is_cut_and_tells_apart(name: str) -> None:
    assert len(os.fsencode(short_name(name))) <= 60
    longer = f"{name}{'x' * 60}"
    assert short_name(longer) != short_name(f"{longer}y")
