"""An HTTP proxy on loopback between a client and a store, in a thread of its own.

It reads a whole request, passes it on, reads the whole answer, and passes that back.  What goes wrong in between, a
test says:

    proxy.faults = [refuse(503, retry_after=1, first=3), delay(0.02, methods=("PUT",))]

Where the server names itself in the headers of an answer, the client reads the name of the proxy.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import threading
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Self
from urllib.parse import SplitResult, parse_qs, urlsplit

WITHOUT_BODY = (204, 304)
REFUSAL = "as the test wants it"


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
    reason: str = ""
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


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that goes wrong with requests that come through a proxy; made by the functions below.

    Attributes:
        what: `delay`, `refuse`, `drop_request`, `drop_before_answer`, `drop_answer`, `truncate`, `flip`, or `hold`.
        amount: Seconds for a delay, a status, the share of a body that passes, or the number of requests that overtake.
        headers: Of the answer, for a refusal.
        share: Of the requests that match, how many are concerned: which, the seed of the proxy says.
        after: So many requests that match pass before the first.
        first: At most so many are concerned; None for no limit.
        methods: Of the requests that match; all if empty.
        pattern: A regular expression that is found in the target of those that match.
    """

    what: str
    amount: float = 0
    headers: tuple[tuple[str, str], ...] = ()
    share: float = 1.0
    after: int = 0
    first: int | None = None
    methods: tuple[str, ...] = ()
    pattern: str = ""

    def matches(self, method: str, target: str) -> bool:
        """Returns whether a request is one that the fault is about."""
        return (not self.methods or method in self.methods) and re.search(self.pattern, target) is not None


def delay(seconds: float, **which: Any) -> Fault:
    """Returns a fault: the server is asked later."""
    return Fault("delay", seconds, **which)


def refuse(status: int, *, retry_after: int | None = None, **which: Any) -> Fault:
    """Returns a fault: the server is not asked, and the client reads a status such as 429 or 503."""
    wait = () if retry_after is None else (("Retry-After", str(retry_after)),)
    return Fault("refuse", status, wait, **which)


def drop_request(passing: float = 0.5, **which: Any) -> Fault:
    """Returns a fault: the connection closes when a share of the body has come, and the server hears nothing."""
    return Fault("drop_request", passing, **which)


def drop_before_answer(**which: Any) -> Fault:
    """Returns a fault: the server does what it is asked, and the connection closes before the client hears of it."""
    return Fault("drop_before_answer", **which)


def drop_answer(passing: float = 0.5, **which: Any) -> Fault:
    """Returns a fault: the connection closes when a share of the answer's body has been sent."""
    return Fault("drop_answer", passing, **which)


def truncate(passing: float = 0.5, **which: Any) -> Fault:
    """Returns a fault: the body of an answer ends early, and its length says so: the client cannot see it."""
    return Fault("truncate", passing, **which)


def flip(place: float = 0.5, **which: Any) -> Fault:
    """Returns a fault: one bit of the answer's body is another one."""
    return Fault("flip", place, **which)


def hold(overtaking: int = 3, **which: Any) -> Fault:
    """Returns a fault: the server is asked when so many later requests have been answered, or none is under way."""
    return Fault("hold", overtaking, **which)


class Proxy:
    """A proxy for the server at a URL, from `with` until its end.

    Attributes:
        url: What a client is given instead of the server's own URL.
        faults: What goes wrong from now on; of several that a request matches, the first.
        seed: Which requests a fault with a share concerns: the same for the same requests, in whatever order.
        requests: What came, in order: the method and the target.
        hits: How often something went wrong.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = upstream
        self.url = ""
        self.reset(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._answered = 0
        self._under_way = 0
        self._held = 0

    def reset(self, seed: int = 0) -> None:
        """Forgets faults and requests."""
        self.faults: Sequence[Fault] = ()
        self.seed = seed
        self.requests: list[tuple[str, str]] = []
        self.hits = 0
        self._matched: Counter[Fault] = Counter()
        self._concerned: Counter[Fault] = Counter()
        self._seen: Counter[tuple[Fault, str, str]] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20, backlog=512))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *failure: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        own = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not own]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def forward(self, request: Request, upstream: Connection) -> Answer:
        """Returns what the server answers.  Proxies of other kinds change this."""
        return await upstream.ask(request)

    def refusal(self, status: int, headers: tuple[tuple[str, str], ...]) -> Answer:
        """Returns the answer that refuses a request.  Proxies of other kinds change this, to what their server says."""
        return Answer(status, headers, REFUSAL.encode(), "Refused")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = Connection(self)
        try:
            while await self._exchange(reader, writer, upstream):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone, or the proxy ends
        finally:
            upstream.close()
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: Connection) -> bool:
        head = await read_head(reader)
        if head is None:
            return False
        first, headers = head
        method, target, _ = first.split(" ", 2)
        self.requests.append((method, target))
        fault = self._choose(method, target)
        if "100-continue" in value_of(headers, "expect").lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is not None and fault.what == "drop_request":
            await reader.readexactly(int(fault.amount * int(value_of(headers, "content-length") or 0)))
            writer.transport.abort()
            return False
        request = Request(method, target, headers, await read_body(headers, reader, to_the_end=False))
        self._under_way += 1
        try:
            answer = await self._answer(request, fault, upstream)
        finally:
            self._under_way -= 1
            self._answered += 1
        return await _send(answer, fault, writer)

    def _choose(self, method: str, target: str) -> Fault | None:
        for place, fault in enumerate(self.faults):
            if not fault.matches(method, target):
                continue
            self._matched[fault] += 1
            self._seen[fault, method, target] += 1
            draw = random.Random(f"{self.seed} {place} {method} {target} {self._seen[fault, method, target]}").random()
            over = fault.first is not None and self._concerned[fault] >= fault.first
            if not over and self._matched[fault] > fault.after and draw < fault.share:
                self._concerned[fault] += 1
                self.hits += 1
                return fault
        return None

    async def _answer(self, request: Request, fault: Fault | None, upstream: Connection) -> Answer:
        what = "" if fault is None else fault.what
        if fault is not None and what == "refuse":
            return self.refusal(int(fault.amount), fault.headers)
        if fault is not None and what == "delay":
            await asyncio.sleep(fault.amount)
        if fault is not None and what == "hold":
            await self._wait_for_later(int(fault.amount))
        return await self.forward(request, upstream)

    async def _wait_for_later(self, number: int) -> None:
        """Waits until so many requests have been answered, or for a moment in which all that came are waiting."""
        self._held += 1
        until, quiet = self._answered + number, 0
        while self._answered < until and quiet < ROUNDS_OF_QUIET:
            await asyncio.sleep(ROUND)
            quiet = quiet + 1 if self._held == self._under_way else 0
        self._held -= 1


# A request that is held while no other is under way goes on after so many looks at that.
ROUNDS_OF_QUIET, ROUND = 10, 0.002


async def _send(answer: Answer, fault: Fault | None, writer: asyncio.StreamWriter) -> bool:
    """Sends an answer, and says whether the connection is still good."""
    what, amount = ("", 0.0) if fault is None else (fault.what, fault.amount)
    if what == "drop_before_answer":
        writer.transport.abort()
        return False
    body = answer.body
    end = int(amount * len(body))
    if what == "truncate":
        answer = dataclasses.replace(answer, body=body[:end])
    if what == "flip" and body:
        at = min(end, len(body) - 1)
        answer = dataclasses.replace(answer, body=body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
    encoded = answer.encoded()
    if what == "drop_answer":
        writer.write(encoded[: len(encoded) - len(body) + end])
        await writer.drain()
        return False
    writer.write(encoded)
    await writer.drain()
    return True


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
