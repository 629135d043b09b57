"""The proxy before the object stores of the tests: each fault is what its name says, and the seed chooses."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from proxy import Proxy, delay, drop_answer, drop_before_answer, drop_request, flip, hold, refuse, truncate

BODY = bytes(range(256)) * 8


class Server(http.server.ThreadingHTTPServer):
    """A server that answers GET with `BODY`, notes what it is sent, and says its own name in a header."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.path, b""))
        self.send_response(200)
        self.send_header("Location", f"{self.server.url}/next")
        if self.path.startswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"800\r\n" + BODY + b"\r\n0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(BODY)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.server.seen.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def between(server: Server) -> Iterator[Proxy]:
    with Proxy(server.url) as made:
        yield made


def get(proxy: Proxy, path: str = "/a", method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
    with urllib.request.urlopen(urllib.request.Request(proxy.url + path, body, method=method), timeout=20) as answer:
        return answer.status, answer.read()


def test_passes_on_what_it_reads(server: Server, between: Proxy) -> None:
    assert get(between, "/a?b=c%2Fd") == (200, BODY)
    assert get(between, "/chunked") == (200, BODY)
    assert get(between, "/put", "PUT", BODY) == (204, b"")
    assert get(between, "/a", "HEAD") == (200, b"")
    assert server.seen == [("/a?b=c%2Fd", b""), ("/chunked", b""), ("/put", BODY), ("/a", b"")]
    assert between.requests == [("GET", "/a?b=c%2Fd"), ("GET", "/chunked"), ("PUT", "/put"), ("HEAD", "/a")]
    assert between.hits == 0


def test_names_itself_where_the_server_names_itself(between: Proxy) -> None:
    with urllib.request.urlopen(f"{between.url}/a") as answer:
        assert answer.headers["Location"] == f"{between.url}/next"


def test_keeps_a_connection_for_several_requests(between: Proxy) -> None:
    connection = http.client.HTTPConnection(between.url.removeprefix("http://"), timeout=20)
    for _ in range(3):
        connection.request("GET", "/a")
        assert connection.getresponse().read() == BODY
    connection.close()


def test_answers_a_client_that_asks_before_it_sends_a_body(server: Server, between: Proxy) -> None:
    connection = http.client.HTTPConnection(between.url.removeprefix("http://"), timeout=20)
    connection.request("PUT", "/a", BODY, {"Expect": "100-continue"})
    assert connection.getresponse().status == 204
    connection.close()
    assert server.seen == [("/a", BODY)]


def test_refuses_the_first_requests_and_asks_no_server(server: Server, between: Proxy) -> None:
    between.faults = [refuse(429, retry_after=7, first=2)]
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(between)
        with caught.value as refusal:
            assert (refusal.code, refusal.headers["Retry-After"]) == (429, "7")
    assert not server.seen
    assert get(between) == (200, BODY)
    assert between.hits == 2


def test_refuses_without_saying_when_to_come_again(between: Proxy) -> None:
    between.faults = [refuse(503)]
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(between)
    with caught.value as refusal:
        assert (refusal.code, refusal.headers["Retry-After"]) == (503, None)


def test_concerns_only_the_requests_that_match(between: Proxy) -> None:
    between.faults = [refuse(503, methods=("PUT",), pattern="manifest$", after=1)]
    assert get(between, "/manifest") == (200, BODY)
    assert get(between, "/array", "PUT", b"") == (204, b"")
    assert get(between, "/manifest", "PUT", b"") == (204, b"")
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(between, "/manifest", "PUT", b"")
    caught.value.close()


def refused(between: Proxy, paths: list[str]) -> set[str]:
    found = set()
    for path in paths:
        try:
            get(between, path)
        except urllib.error.HTTPError as refusal:
            refusal.close()
            found.add(path)
    return found


def test_the_seed_chooses_the_same_requests_in_any_order(between: Proxy) -> None:
    paths = [f"/{number}" for number in range(40)]
    between.faults = [refuse(503, share=0.5)]
    before = refused(between, paths)
    assert 5 < len(before) < 35
    between.reset()
    between.faults = [refuse(503, share=0.5)]
    assert refused(between, paths[::-1]) == before
    between.reset(seed=1)
    between.faults = [refuse(503, share=0.5)]
    assert refused(between, paths) != before


def test_a_request_that_was_refused_can_pass_when_it_comes_again(between: Proxy) -> None:
    between.faults = [refuse(503, share=0.5)]
    assert 5 < sum(bool(refused(between, ["/a"])) for _ in range(40)) < 35


def test_delays(between: Proxy) -> None:
    between.faults = [delay(0.2)]
    before = time.monotonic()
    assert get(between) == (200, BODY)
    assert time.monotonic() - before >= 0.2


def test_drops_a_connection_in_the_middle_of_what_is_sent(server: Server, between: Proxy) -> None:
    between.faults = [drop_request(0.5)]
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        get(between, "/put", "PUT", BODY)
    assert not server.seen
    assert between.hits == 1


def test_drops_a_connection_when_the_server_has_done_it(server: Server, between: Proxy) -> None:
    between.faults = [drop_before_answer()]
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        get(between, "/put", "PUT", BODY)
    assert server.seen == [("/put", BODY)]


@pytest.mark.parametrize("passing", [0.0, 0.25, 0.999])
def test_drops_a_connection_in_the_middle_of_an_answer(passing: float, between: Proxy) -> None:
    between.faults = [drop_answer(passing)]
    with pytest.raises(http.client.IncompleteRead) as caught:
        get(between)
    assert caught.value.partial == BODY[: int(passing * len(BODY))]


def test_truncates_so_that_a_client_cannot_see_it(between: Proxy) -> None:
    between.faults = [truncate(0.25)]
    assert get(between) == (200, BODY[: len(BODY) // 4])


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_flips_a_bit(place: float, between: Proxy) -> None:
    between.faults = [flip(place)]
    _, body = get(between)
    changed = [at for at, byte in enumerate(BODY) if body[at] != byte]
    assert changed == [min(int(place * len(BODY)), len(BODY) - 1)]


def test_holds_a_request_until_later_ones_have_passed(server: Server, between: Proxy) -> None:
    between.faults = [hold(2, pattern="^/held")]
    # The later ones are slow enough to come while the first is held, and not to be over before.
    between.faults = [*between.faults, delay(0.3, pattern="^/later")]
    threads = [threading.Thread(target=get, args=(between, path)) for path in ("/held", "/later1", "/later2")]
    for number, thread in enumerate(threads, 1):
        thread.start()
        wait_for(between, number)
    for thread in threads:
        thread.join()
    assert [path for path, _ in server.seen][-1] == "/held"


def wait_for(between: Proxy, number: int) -> None:
    until = time.monotonic() + 10
    while len(between.requests) < number and time.monotonic() < until:
        time.sleep(0.001)


def test_a_request_that_is_held_alone_goes_on(between: Proxy) -> None:
    between.faults = [hold(5)]
    assert get(between) == (200, BODY)
    assert between.hits == 1


def test_the_first_fault_that_matches_is_the_one(between: Proxy) -> None:
    between.faults = [refuse(429, pattern="^/a"), refuse(503)]
    for path, status in (("/a", 429), ("/b", 503)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(between, path)
        with caught.value as refusal:
            assert refusal.code == status


def test_a_server_that_is_gone_closes_the_connection() -> None:
    with Proxy("http://127.0.0.1:9") as between, pytest.raises((ConnectionError, http.client.HTTPException)):
        get(between)
