"""An HTTP proxy on loopback between a client and a store, in a thread of its own.

It reads a whole request, passes it on, reads the whole answer, and passes that back.  What goes wrong in between is
`faults`.  Where the servers name themselves in an answer, the client reads the name of the proxy.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Coroutine
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

WITHOUT_BODY = (204, 304)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asks: the target is the path and the query, as they were sent."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    @property
    def url(self) -> SplitResult:
        """The target, split."""
        return urlsplit(self.target)

    @property
    def query(self) -> dict[str, str]:
        """The first value of each parameter."""
        return {name: values[0] for name, values in parse_qs(self.url.query, keep_blank_values=True).items()}

    def encoded(self, host: str) -> bytes:
        """Returns the bytes to send to a host."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in CHANGED]
        return _encoded(f"{self.method} {self.target} HTTP/1.1", [("Host", host), *kept], self.body)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a server answers; `length` is what it says of a body that it does not send, as for HEAD."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    reason: str = "as told"
    length: int | None = None

    def encoded(self) -> bytes:
        """Returns the bytes to send."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in CHANGED]
        return _encoded(f"HTTP/1.1 {self.status} {self.reason}", kept, self.body, self.length)


CHANGED = ("host", "connection", "keep-alive", "content-length", "transfer-encoding", "expect")


def _encoded(first: str, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers)]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class Proxy:
    """A proxy for the server at a URL, from `with` until its end.

    Attributes:
        url: What a client is given instead of the server's own URL.
        requests: What came, in order: the method and the target.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        self.requests: list[tuple[str, str]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self.run(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *failure: object) -> None:
        self.run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine in the thread of the proxy, and returns what it returns."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def answer(self, request: Request, upstream: Connection) -> Answer | None:
        """Returns what the client is to read; None closes its connection.  Proxies of other kinds change this."""
        return await upstream.ask(request)

    async def send(self, request: Request, answer: Answer, writer: asyncio.StreamWriter) -> bool:
        """Sends an answer, and says whether the connection is still good."""
        writer.write(answer.encoded())
        await writer.drain()
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = Connection(self)
        try:
            good = True
            while good:
                request = await self._read(reader, writer)
                if request is None:
                    return
                self.requests.append((request.method, request.target))
                answer = await self.answer(request, upstream)
                good = answer is not None and await self.send(request, answer, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the proxy ends
        finally:
            upstream.close()
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
        head = await read_head(reader)
        if head is None:
            return None
        first, headers = head
        method, target, _ = first.split(" ", 2)
        if "100-continue" in value_of(headers, "expect").lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Request(method, target, headers, await self.read_body(headers, reader, writer))

    async def read_body(
        self, headers: tuple[tuple[str, str], ...], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes:
        """Returns the body of a request."""
        return await read_body(headers, reader, to_the_end=False)


class Connection:
    """A connection from a proxy to its server, made when it is needed and again when the server has closed it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Request) -> Answer:
        """Returns the server's answer."""
        old = self._streams is not None
        try:
            return await self._ask(request)
        except (ConnectionError, asyncio.IncompleteReadError):
            self.close()
            if not old:
                raise
        return await self._ask(request)  # the server had closed a connection that was idle

    async def _ask(self, request: Request) -> Answer:
        host = urlsplit(self._proxy.upstream).netloc
        if self._streams is None:
            name, port = host.split(":")
            self._streams = await asyncio.open_connection(name, int(port), limit=2**20)
        reader, writer = self._streams
        writer.write(request.encoded(host))
        await writer.drain()
        head = await read_head(reader)
        if head is None:
            raise ConnectionResetError("the server closed the connection")
        first, headers = head
        _, status, reason = (first + " ").split(" ", 2)
        silent = request.method == "HEAD" or int(status) in WITHOUT_BODY
        body = b"" if silent else await read_body(headers, reader, to_the_end=True)
        length = int(value_of(headers, "content-length") or 0) if silent else None
        if value_of(headers, "connection").lower() == "close" or first.startswith("HTTP/1.0"):
            self.close()
        renamed = tuple((name, value.replace(self._proxy.upstream, self._proxy.url)) for name, value in headers)
        return Answer(int(status), renamed, body, reason.strip(), length)

    def close(self) -> None:
        """Closes the connection, if there is one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def read_head(reader: asyncio.StreamReader) -> tuple[str, tuple[tuple[str, str], ...]] | None:
    """Returns the first line and the headers of a message, or None at the end of a connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as end:
        if end.partial:
            raise
        return None
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return first, tuple((name, value.strip()) for name, value in pairs)


async def read_body(headers: tuple[tuple[str, str], ...], reader: asyncio.StreamReader, *, to_the_end: bool) -> bytes:
    """Returns the body of a message, however its length is given."""
    if "chunked" in value_of(headers, "transfer-encoding").lower():
        return await _read_chunks(reader)
    length = value_of(headers, "content-length")
    if length:
        return await reader.readexactly(int(length))
    return await reader.read() if to_the_end else b""


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while True:
        size = int((await reader.readline()).split(b";")[0], 16)
        if not size:
            break
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while (await reader.readline()).strip():
        pass  # trailers
    return b"".join(chunks)


def value_of(headers: tuple[tuple[str, str], ...], name: str) -> str:
    """Returns the value of a header, or an empty string."""
    return next((value for found, value in headers if found.lower() == name), "")
