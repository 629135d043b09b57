"""An S3 emulator on loopback: moto's server, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from proxy import REFUSAL, Answer, Proxy
from tied_processes import tied

PROGRAM = Path(__file__).parent / "programs/serve_s3.py"
REGION = "us-east-1"


def missing() -> str:
    """Returns why the emulator cannot run on this machine; an empty string where it can."""
    return "" if importlib.util.find_spec("moto") else "moto[server] is not installed"


class S3Proxy(Proxy):
    """Refuses in the words of Amazon's store."""

    def refusal(self, status: int, headers: tuple[tuple[str, str], ...]) -> Answer:
        """Returns a refusal, as XML."""
        code = {400: "ExpiredToken", 403: "AccessDenied", 429: "TooManyRequests", 503: "SlowDown"}[status]
        body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{REFUSAL}</Message></Error>"
        return Answer(status, (*headers, ("Content-Type", "application/xml")), body.encode(), "Refused")


@contextlib.contextmanager
def s3_server() -> Iterator[Proxy]:
    """Runs an emulator, and gives a proxy before it."""
    with tied([sys.executable, str(PROGRAM)]) as process:
        assert process.stdout is not None
        port = process.stdout.readline()
        assert port, "the emulator has ended"
        with S3Proxy(f"http://127.0.0.1:{int(port)}") as proxy:
            yield proxy


def create_bucket(url: str, name: str) -> None:
    """Creates a bucket."""
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT")):
        pass


def environment(url: str) -> dict[str, str]:
    """Returns what sends s3fs and boto to the emulator, here and in programs that are started.

    TensorStore takes its credentials from here, but not the URL: `endpoint` of its spec says that.
    """
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
