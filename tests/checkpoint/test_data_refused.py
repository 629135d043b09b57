"""What `data=` refuses: no iterator, a position that cannot be written or read, an iterator that does not go there."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from checkpoint_models import assert_identical, number_of, numbered, taken
from iterators import PIPELINES, Counting, Holding, drawn, elastic, loader, numbers
from refusals import refused

AGAIN = "an iterator of the same pipeline as was saved; or leave out data=, to start the data again"
ANOTHER = "another step: checkpoints.restore(target, step=..., data=iterator); or leave out data="
OWN = "an iterator of Grain's, or of your own with these two methods; another item has another name"
NAME = "iterators.Counting"


class Dict:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> Any:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> sw.Checkpoints:
    """A step with the position of `Counting` after five numbers, and another after seven."""
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        iterator = Counting()
        drawn(iterator, 5)
        checkpoints.save(1, numbered(1), data=iterator, note="here")
        drawn(iterator, 2)
        checkpoints.save(2, numbered(2), data=iterator)
    return checkpoints


# --- what is not an iterator -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "name", "hint"),
    [
        ({"epoch": 1}, "dict", OWN),
        (3, "int", OWN),
        (iter([1]), "list_iterator", OWN),
        (Counting, "type", OWN),
        (grain.checkpoint.CheckpointSave(Counting()), "grain._src.python.checkpoint.handler.CheckpointSave", OWN),
        (
            loader(),
            "grain._src.python.data_loader.DataLoader",
            "iterator = iter(dataset), once, before the loop; then data=iterator",
        ),
        (
            Dict(),
            "test_data_refused.Dict",
            "an object with get_state() that returns its state_dict(), and set_state(state) that loads it",
        ),
    ],
    ids=lambda given: type(given).__name__ if not isinstance(given, str) else "",
)
def test_what_does_not_say_where_it_is(saved: sw.Checkpoints, data: Any, name: str, hint: str) -> None:
    message = (
        f"data= is {name.replace('test_data_refused', Dict.__module__)}, which has no get_state() and set_state(state)."
    )
    with sw.Checkpoints(saved.directory) as checkpoints:
        with refused(sw.SaveError, message, hint=hint):
            checkpoints.save(3, numbered(1), data=data)
        with refused(sw.RestoreError, message, hint=hint):
            checkpoints.restore(numbered(1), data=data)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({1: 2}, "it has the key 1, which JSON would turn into text"),
        ({"a": [0, {(1, 2): 3}]}, "it has the key (1, 2) at ['a'][1], which JSON would turn into text"),
        ({"a": {1}}, "it has set at ['a'], which JSON cannot represent"),
        ([1j], "it has complex at [0], which JSON cannot represent"),
        (bytearray(b"a"), "it has bytearray, which JSON cannot represent"),
    ],
)
def test_a_position_that_json_would_change(saved: sw.Checkpoints, state: Any, why: str) -> None:
    hint = "get_state() that returns bytes, or dicts with text as keys, lists, numbers and text"
    message = f"The position of iterators.Holding cannot be written: {why}."
    with sw.Checkpoints(saved.directory) as checkpoints:
        with refused(sw.SaveError, message, hint=hint):
            checkpoints.save(3, numbered(1), data=Holding(state))
        with refused(sw.RestoreError, message, hint=hint):
            checkpoints.restore(numbered(1), data=Holding(state))
        assert checkpoints.save(3, numbered(3), data=Counting())  # nothing of the other is in progress


def test_an_iterator_that_cannot_say_where_it_is(saved: sw.Checkpoints) -> None:
    class Closed(Counting):
        def get_state(self) -> Any:
            raise RuntimeError("it is closed")

    message = f"{Closed.__module__}.{Closed.__qualname__}.get_state() failed: RuntimeError: it is closed."
    hint = "an iterator that can say where it is; or leave out data="
    with sw.Checkpoints(saved.directory) as checkpoints:
        with refused(sw.SaveError, message, hint=hint):
            checkpoints.save(3, numbered(1), data=Closed())
        with refused(sw.RestoreError, message, hint=hint):
            checkpoints.restore(numbered(1), data=Closed())


# --- what is not in the step -------------------------------------------------------------------------------------


def test_a_step_without_a_position(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), note="here")
        with refused(sw.RestoreError, "Step 1 has no item 'data'.", hint="one of: note, state"):
            checkpoints.restore(numbered(0), data=Counting())


def test_a_position_is_not_an_extra_item_and_an_extra_item_not_a_position(saved: sw.Checkpoints) -> None:
    with sw.Checkpoints(saved.directory) as checkpoints:
        message = "The item 'data' of step 2 is the position of an iterator."
        with refused(sw.RestoreError, message, hint="checkpoints.restore(target, step=2, data=iterator)"):
            checkpoints.restore(numbered(0), extra="data")
    with ocp.CheckpointManager(saved.directory) as manager:  # as before there was `data=`
        items = {"state": sw.checkpointable(numbered(3)), "data": ocp.args.JsonSave({"epoch": 1})}
        manager.save(3, args=ocp.args.Composite(**items))
    with sw.Checkpoints(saved.directory) as checkpoints:
        message = "The item 'data' of step 3 is not the position of an iterator."
        hint = "checkpoints.restore(target, step=3, extra='data'), if it was saved as JSON"
        with refused(sw.RestoreError, message, hint=hint):
            checkpoints.restore(numbered(0), data=Counting())
        assert checkpoints.restore(numbered(0), extra="data").extra == {"data": {"epoch": 1}}


# --- an iterator that does not go there --------------------------------------------------------------------------


def test_another_pipeline_keeps_its_position_and_says_what_grain_says(saved: sw.Checkpoints) -> None:
    iterator = PIPELINES["map"]()
    drawn(iterator, 2)
    name = f"{type(iterator).__module__}.{type(iterator).__qualname__}"
    message = f"{name} did not take the position of step 2, of {NAME}: KeyError: 'next_index'. It is where it was."
    with sw.Checkpoints(saved.directory) as checkpoints, refused(sw.RestoreError, message, hint=AGAIN):
        checkpoints.restore(numbered(0), data=iterator)
    expected = PIPELINES["map"]()
    drawn(expected, 2)
    assert drawn(iterator, 100) == drawn(expected, 100)


def test_a_shorter_dataset_goes_back_after_grain_moved_it(tmp_path: pathlib.Path) -> None:
    longer, shorter = iter(numbers().repeat(2).to_iter_dataset()), iter(numbers()[:10].to_iter_dataset())
    drawn(longer, 30)
    drawn(shorter, 1)
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), data=longer)
        with pytest.raises(sw.RestoreError, match=r"of grain .*: IndexError: .*`next_index` 30 is out of range"):
            checkpoints.restore(numbered(0), data=shorter)
    assert shorter.get_state() == {"next_index": 1}


def test_a_loader_with_another_number_of_workers_is_refused_by_grain(tmp_path: pathlib.Path) -> None:
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), data=iter(loader()))
        with pytest.raises(sw.RestoreError, match="Worker count in checkpoint does not match"):
            checkpoints.restore(numbered(0), data=iter(loader(worker_count=1)))


def test_an_iterator_that_says_it_is_somewhere_else(saved: sw.Checkpoints) -> None:
    class Forgets(Counting):
        def set_state(self, state: Any) -> None:
            super().set_state({**state, "next": state["next"] // 2 * 2})

    iterator = Forgets()
    name = f"{Forgets.__module__}.{Forgets.__qualname__}"
    why = "get_state() then does not return what set_state was given. It is where it was."
    message = f"{name} did not take the position of step 2, of {NAME}: {why}"
    with sw.Checkpoints(saved.directory) as checkpoints, refused(sw.RestoreError, message, hint=AGAIN):
        checkpoints.restore(numbered(0), data=iterator)
    assert iterator.position == {"epoch": 0, "next": 0}


def test_an_iterator_that_goes_nowhere(saved: sw.Checkpoints) -> None:
    class Broken(Counting):
        def set_state(self, state: Any) -> None:
            raise ValueError(f"not {state['next']}")

    name = f"{Broken.__module__}.{Broken.__qualname__}"
    message = (
        f"{name} did not take the position of step 2, of {NAME}: ValueError: not 0. "
        "It did not go back to its own position either: make it again."
    )
    with sw.Checkpoints(saved.directory) as checkpoints, refused(sw.RestoreError, message, hint=AGAIN):
        checkpoints.restore(numbered(0), data=Broken())


class Drifting(Counting):
    """Is one further than where it is told to go."""

    def set_state(self, state: Any) -> None:
        super().set_state({key: value + 1 for key, value in state.items()})


def test_an_iterator_that_does_not_go_back_is_not_said_to_be_where_it_was(saved: sw.Checkpoints) -> None:
    with pytest.raises(sw.RestoreError, match="It did not go back to its own position either: make it again"):
        saved.restore(numbered(0), data=Drifting())


@pytest.mark.parametrize(
    ("depth", "number", "why"), [(0, 10**5000, "digits"), (3000, 1, "recursion")], ids=["long", "deep"]
)
def test_a_position_that_cannot_be_written_is_not_a_failure_of_get_state(
    tmp_path: pathlib.Path, depth: int, number: int, why: str
) -> None:
    message = f"The position of iterators.Holding cannot be written: .*{why}"
    with sw.Checkpoints(tmp_path) as checkpoints, pytest.raises(sw.SaveError, match=message):
        checkpoints.save(3, numbered(3), data=Holding([number, nested(depth)]))


def nested(depth: int) -> list[Any]:
    state: list[Any] = []
    for _ in range(depth):
        state = [state]
    return state


def test_an_iterator_stays_where_it_is_if_the_arrays_do_not_fit(saved: sw.Checkpoints) -> None:
    iterator = Counting()
    target = taken({"a": jax.numpy.zeros(5), "b": jax.numpy.arange(4)})
    with sw.Checkpoints(saved.directory) as checkpoints:
        with pytest.raises(sw.RestoreError):
            checkpoints.restore(target, data=iterator)
        with pytest.raises(sw.RestoreError, match="no item 'other'"):
            checkpoints.restore(numbered(0), data=iterator, extra="other")
        for file in (checkpoints.path(2) / "d").iterdir():
            file.write_bytes(bytes(len(file.read_bytes())))
        with pytest.raises(sw.CorruptedError):
            checkpoints.restore(numbered(0), data=iterator)
    assert iterator.position == {"epoch": 0, "next": 0}


def test_a_target_stays_as_it_is_if_the_iterator_refuses(saved: sw.Checkpoints) -> None:
    target = numbered(9)
    with sw.Checkpoints(saved.directory) as checkpoints:
        with pytest.raises(sw.RestoreError, match="did not take"):
            checkpoints.restore(target, data=PIPELINES["map"]())
        assert number_of(target) == 9
        assert number_of(checkpoints.restore(target).state) == 2


# --- files that are not what was written -------------------------------------------------------------------------


def data_of(checkpoints: sw.Checkpoints, step: int) -> pathlib.Path:
    return pathlib.Path(checkpoints.directory) / str(step) / "data"


@settings(max_examples=40)
@given(drawing=st.data())
def test_a_flipped_bit_never_moves_the_data(tmp_path_factory: pytest.TempPathFactory, drawing: st.DataObject) -> None:
    iterator, again = Counting(), Counting()
    drawn(iterator, 12)
    with sw.Checkpoints(tmp_path_factory.mktemp("run")) as checkpoints:
        checkpoints.save(1, numbered(1), data=iterator)
        checkpoints.wait()
        files = sorted(file for file in data_of(checkpoints, 1).iterdir() if file.name.startswith("process"))
        assert [file.name for file in files] == ["process_0-of-1.json", "process_0-of-1.statewise"]
        file = drawing.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        content[drawing.draw(st.integers(0, len(content) - 1))] ^= 1 << drawing.draw(st.integers(0, 7))
        cut = drawing.draw(st.integers(0, len(content)))
        file.write_bytes(content[:cut] if drawing.draw(st.booleans()) else content)
        try:
            checkpoints.restore(numbered(0), data=again)
        except (sw.CorruptedError, sw.RestoreError):
            assert again.position == {"epoch": 0, "next": 0}
        else:
            assert again.position == iterator.position  # the flip was in what only messages show


def corrupted(why: str) -> str:
    return f"The item 'data' of step 1 is corrupted: process_0-of-1.{why}."


def change(file: pathlib.Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


DAMAGE: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "a digit": (
        lambda data: (data / "process_0-of-1.json").write_text('{"epoch": 0, "next": 6}'),
        corrupted("json: it is not what was written"),
    ),
    "the position": (
        lambda data: (data / "process_0-of-1.json").write_text("{"),
        corrupted("json: it is not JSON"),
    ),
    "a word of the record": (
        lambda data: change(data / "process_0-of-1.statewise", state="jsom"),
        corrupted("statewise: it is not a record of Statewise's"),
    ),
    "the record": (
        lambda data: (data / "process_0-of-1.statewise").write_text("{}"),
        corrupted("statewise: it is not a record of Statewise's"),
    ),
    "of another step": (
        lambda data: [file.write_bytes((data / f"../../2/data/{file.name}").read_bytes()) for file in data.iterdir()],
        corrupted("json: it was saved with step 2"),
    ),
    "a file more": (
        lambda data: (data / "process_0-of-1.bytes").write_bytes(b""),
        "The item 'data' of step 1 does not have one file for each process: process_0-of-1.bytes.",
    ),
    "a process less": (
        lambda data: (data / "process_0-of-1.json").rename(data / "process_0-of-2.json"),
        "The item 'data' of step 1 does not have one file for each process: process 1 of 2 has none.",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_files_that_are_not_what_was_written(saved: sw.Checkpoints, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(data_of(saved, 1))
    iterator = Counting()
    with sw.Checkpoints(saved.directory) as checkpoints:
        with refused(sw.CorruptedError, message, hint=ANOTHER):
            checkpoints.restore(numbered(0), step=1, data=iterator)
        assert iterator.position == {"epoch": 0, "next": 0}
        assert_identical(
            checkpoints.restore(numbered(0), step=1).state, numbered(0).replace(variables=numbered(1)["variables"])
        )


def test_a_format_of_a_later_version(saved: sw.Checkpoints) -> None:
    change(data_of(saved, 1) / "process_0-of-1.statewise", format=2)
    message = "The item 'data' of step 1 is of format 2, which this version does not know."
    hint = "pip install --upgrade statewise"
    with sw.Checkpoints(saved.directory) as checkpoints, refused(sw.RestoreError, message, hint=hint):
        checkpoints.restore(numbered(0), step=1, data=Counting())


# --- another number of processes ---------------------------------------------------------------------------------
# Real processes are in tests/processes/test_data_together.py.


def of_two(data: pathlib.Path, *, second: dict[str, Any] | None = None) -> None:
    """Makes of the files of one process those of two."""
    for suffix in ("json", "statewise"):
        file = (data / f"process_0-of-1.{suffix}").rename(data / f"process_0-of-2.{suffix}")
        (data / f"process_1-of-2.{suffix}").write_bytes(file.read_bytes())
    if second is not None:
        (data / "process_1-of-2.json").write_text(json.dumps(second))
        (data / "process_1-of-2.statewise").unlink()


COUNTS = "The data of step 1 were saved by 2 processes, not by 1."
START = "2 processes again; or leave out data=, and start the data at the step: dataset[step * batch_size :]"


def test_another_number_of_processes(saved: sw.Checkpoints) -> None:
    of_two(data_of(saved, 1))
    message = f"{COUNTS} Each position is of the part that one process had."
    with sw.Checkpoints(saved.directory) as checkpoints, refused(sw.RestoreError, message, hint=START):
        checkpoints.restore(numbered(0), step=1, data=Counting())


@pytest.mark.parametrize("is_iter", [True, False])
def test_an_elastic_iterator_goes_on_with_another_number(tmp_path: pathlib.Path, is_iter: bool) -> None:
    iterator, again = iter(elastic()), iter(elastic()) if is_iter else elastic()
    drawn(iterator, 3)
    with sw.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, numbered(1), data=iterator)
        checkpoints.wait()
        of_two(data_of(checkpoints, 1))
        checkpoints.restore(numbered(0), data=again)
        assert drawn(again, 3) == drawn(iterator, 3)
        of_two_again = data_of(checkpoints, 1) / "process_1-of-2.json"
        of_two_again.write_text('{"global_next_index": 8}')
        of_two_again.with_suffix(".statewise").unlink()
        message = f"{COUNTS} The processes were at different positions."
        with refused(sw.RestoreError, message, hint=START):
            checkpoints.restore(numbered(0), data=again)
