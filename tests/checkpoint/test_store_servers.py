"""The object stores that tests run on: what TensorStore and epath write is read, and conditions are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
import tensorstore as ts
from etils import epath

ABSENT = b"\2"  # the generation that TensorStore gives for what is missing


def opened(url: str) -> Any:
    store, bucket = url.split("://")
    if store == "gs":
        return ts.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
    spec = {"driver": "s3", "bucket": bucket, "endpoint": os.environ["AWS_ENDPOINT_URL"], "aws_region": "us-east-1"}
    return ts.KvStore.open(spec).result()


def test_tensorstore_reads_what_it_wrote(stores: str) -> None:
    kv = opened(stores)
    kv.write("a/b", b"\0\xff\r\n").result()
    kv.write("c", b"").result()
    assert kv.list().result() == [b"a/b", b"c"]
    assert (kv.read("a/b").result().value, kv.read("c").result().value) == (b"\0\xff\r\n", b"")
    kv.delete_range(ts.KvStore.KeyRange("a", "b")).result()
    assert kv.list().result() == [b"c"]


def test_an_absent_key_has_the_generation_that_a_condition_names(stores: str) -> None:
    assert opened(stores).read("none").result().stamp.generation == ABSENT


def test_what_must_not_exist_is_written_once(stores: str) -> None:
    kv = opened(stores)
    writes = [kv.write("a/b", f"{number}".encode(), if_equal=ABSENT) for number in range(16)]
    won = [number for number, write in enumerate(writes) if write.result().generation]
    assert len(won) == 1
    assert kv.read("a/b").result().value == f"{won[0]}".encode()


def test_what_must_be_the_same_is_replaced_once(stores: str) -> None:
    kv = opened(stores)
    kv.write("a/b", b"before").result()
    before = kv.read("a/b").result().stamp.generation
    writes = [kv.write("a/b", f"{number}".encode(), if_equal=before) for number in range(16)]
    won = [number for number, write in enumerate(writes) if write.result().generation]
    assert len(won) == 1
    assert kv.read("a/b").result().value == f"{won[0]}".encode()


def test_what_has_been_replaced_is_not_deleted(stores: str) -> None:
    kv = opened(stores)
    kv.write("a/b", b"before").result()
    before = kv.read("a/b").result().stamp.generation
    kv.write("a/b", b"after").result()
    assert not kv.write("a/b", None, if_equal=before).result().generation
    assert kv.read("a/b").result().value == b"after"
    kv.write("a/b", None, if_equal=kv.read("a/b").result().stamp.generation).result()
    assert kv.read("a/b").result().state == "missing"


def test_epath_reads_what_it_wrote(stores: str) -> None:
    folder = epath.Path(stores) / "folder"
    (folder / "file").write_bytes(b"\0\xff\r\n")
    assert [path.name for path in folder.iterdir()] == ["file"]
    assert (folder / "file").read_bytes() == b"\0\xff\r\n"


@pytest.mark.parametrize("number", [1, 2])
def test_each_test_has_an_empty_bucket(number: int, stores: str) -> None:
    assert opened(stores).list().result() == []
    opened(stores).write("left", b"").result()


def test_programs_find_the_same_bucket(stores: str) -> None:
    code = f"from etils import epath; epath.Path('{stores}/file').write_text('written')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert opened(stores).read("file").result().value == b"written"


def test_a_server_ends_with_the_process_that_started_it() -> None:
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    starter = f"import sys; sys.path[:0] = {sys.path!r}; from tied_processes import tied\n"
    starter += f"with tied([sys.executable, '-c', {sleeper!r}]) as server:\n"
    starter += "    print(server.stdout.readline(), flush=True)\n    sys.stdin.read()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", starter], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        server = int(process.stdout.readline())
        process.kill()
    until = time.monotonic() + 30
    with pytest.raises(ProcessLookupError):  # noqa: PT012 - it ends in a moment
        while time.monotonic() < until:
            os.kill(server, 0)
            time.sleep(0.01)
