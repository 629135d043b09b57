"""What can happen to an object in a store: for tests of single checkpoints and of steps."""

from __future__ import annotations

from collections.abc import Callable

from statewise._src.checkpoint.orbax.stores import StorePath, listing, remove


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """The bytes with one bit changed."""
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


# From an object, and the one in its place in another step, what is there instead; None for nothing.
HARM: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "flipped at the start": lambda data, other: flipped(data, 0),
    "flipped": lambda data, other: flipped(data, len(data) // 2),
    "flipped at the end": lambda data, other: flipped(data, len(data) - 1),
    "cut": lambda data, other: data[: len(data) // 2],
    "cut by a byte": lambda data, other: data[:-1],
    "longer": lambda data, other: data + b"\0",
    "empty": lambda data, other: b"",
    "removed": lambda data, other: None,
    "of another step": lambda data, other: other,
}
# The others are slow tests.
QUICK = ("flipped", "cut by a byte", "removed", "of another step")


def set_to(path: StorePath, name: str, data: bytes | None) -> None:
    """Replaces an object, or removes it."""
    if data is None:
        remove(path, [name])
    else:
        (path / name).write_bytes(data)


def objects(path: StorePath) -> dict[str, bytes]:
    """Every object below a path, in the order of their names."""
    return {name: (path / name).read_bytes() for name in listing(path)}
