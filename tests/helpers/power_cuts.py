"""What a disk can hold after a power cut, by the system calls that a program made.

The model is what POSIX promises, and no more.  What was written to a file is on the disk when the file has been synced;
an entry of a directory (a new name, a removed one, a renamed one) when the directory has been.  Before that, each such
change may be on the disk or not, by itself, whatever came before or after it: the name of a file before its data, a
deletion before the rename that was made first.  Real file systems do less harm: what holds here holds on all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from system_calls import Call, Handle

__all__ = ["Disk", "Tree", "below", "built"]

# What is in a directory: by the path relative to it, a file's content, or None for a directory.
Tree: TypeAlias = dict[str, bytes | None]
# What is on the disk of a file's data that was not synced: all of it, nothing, zeros in its place, its first half.
Kept: TypeAlias = Literal["all", "none", "zeros", "half"]
KEPT: tuple[Kept, ...] = ("all", "none", "zeros", "half")

_NEVER = 1 << 62


@dataclasses.dataclass(eq=False)
class Change:
    """A change: made between `start` and `end`; on the disk, whatever happens, from `synced` on."""

    start: int
    end: int
    synced: int = dataclasses.field(default=_NEVER, kw_only=True)


@dataclasses.dataclass(eq=False)
class Written(Change):
    """A change of a file's data: bytes at an offset; or, without bytes, a new size."""

    file: int
    offset: int
    data: bytes | None

    def onto(self, content: bytearray) -> None:
        """Makes the change."""
        size = self.offset + len(self.data or b"")
        content.extend(bytes(max(0, size - len(content))))
        if self.data is None:
            del content[self.offset :]
        else:
            content[self.offset : size] = self.data


@dataclasses.dataclass(eq=False)
class Named(Change):
    """A change of the names in a directory: one goes, one is made to mean a file or a directory."""

    folder: int
    gone: str | None
    made: tuple[str, int] | None

    def onto(self, names: dict[int, dict[str, int]]) -> None:
        """Makes the change."""
        entries = names.setdefault(self.folder, {})
        if self.gone is not None:
            entries.pop(self.gone, None)
        if self.made is not None:
            entries[self.made[0]] = self.made[1]


class Disk:
    """A directory that was empty when the calls began.

    Args:
      folder: the directory.
      calls: all calls of the program, in the order of their end.
    """

    def __init__(self, folder: Path, calls: Sequence[Call]) -> None:
        self._folder = str(folder)
        self._written: list[Written] = []
        self._named: list[Named] = []
        self._names: dict[int, dict[str, int]] = {0: {}}  # as the program sees them
        self._directories = {0}
        self._open: dict[int, int] = {}
        self._offsets: dict[int, int] = {}
        self._next = itertools.count(1)
        self._contents: dict[tuple[int, Kept, tuple[int, ...]], bytes] = {}
        self.marks: list[tuple[int, str]] = []
        for call in calls:
            if call.error == "" and call.result >= 0:
                self._follow(call)
            elif call.name == "openat" and (text := self._path_of(call, 0)) and text.startswith(".mark/"):
                self.marks.append((call.end, text.removeprefix(".mark/")))

    # --- the calls ---------------------------------------------------------------------------------------------

    def _path_of(self, call: Call, at: int) -> str | None:
        """The path of an argument, relative to the directory, and to a handle before it; None if it is elsewhere."""
        given = call.arguments[at]
        if isinstance(given, Handle) and at + 1 < len(call.arguments) and isinstance(call.arguments[at + 1], bytes):
            name = call.arguments[at + 1]
            assert isinstance(name, bytes)
            return self._inside(name.decode() if name.startswith(b"/") else f"{given.path}/{name.decode()}")
        assert isinstance(given, bytes), call
        return self._inside(given.decode())

    def _inside(self, path: str) -> str | None:
        if path == self._folder:
            return ""
        return path.removeprefix(f"{self._folder}/") if path.startswith(f"{self._folder}/") else None

    def _find(self, path: str) -> int | None:
        node: int | None = 0
        for name in filter(None, path.split("/")):
            node = None if node is None else self._names.get(node, {}).get(name)
        return node

    def _entry(self, path: str) -> tuple[int, str]:
        parent, _, name = path.rpartition("/")
        node = self._find(parent)
        assert node is not None, f"the model has no {parent!r}"
        return node, name

    def _follow(self, call: Call) -> None:
        family = call.name.removesuffix("at2").removesuffix("at").removesuffix("64").removesuffix("2")
        if call.name in ("openat", "open", "creat"):
            self._opened(call)
        elif family in ("write", "writev", "pwrite", "pwritev", "ftruncate", "fsync", "fdatasync"):
            self._on_handle(call, family)
        elif family in ("rename", "link", "mkdir", "unlink", "rmdir"):
            self._names_changed(call, family)
        elif call.name == "mmap":
            mapped = next((one for one in call.arguments if isinstance(one, Handle)), None)
            shared = "MAP_SHARED" in str(call.arguments[3]) and "PROT_WRITE" in str(call.arguments[2])
            assert not (shared and mapped and mapped.path.startswith(self._folder)), f"not followed: {call}"
        else:
            inside = [one for one in call.arguments if isinstance(one, (bytes, Handle)) and self._folder in _shown(one)]
            assert call.name != "io_uring_setup", "not followed"
            assert not inside, f"not followed: {call}"

    def _opened(self, call: Call) -> None:
        path = self._path_of(call, 0)
        self._open.pop(call.result, None)
        if path is None:
            return
        flags = str(call.arguments[1 if call.name == "open" else 2])
        assert not any(flag in flags for flag in ("SYNC", "O_TMPFILE", "O_APPEND")), f"not followed: {call}"
        node = self._find(path)
        if node is None:
            assert "O_CREAT" in flags, f"the model has no {path!r}"
            node = next(self._next)
            self._change(call, None, (*self._entry(path), node))
        elif "O_TRUNC" in flags:
            self._written.append(Written(call.start, call.end, node, 0, None))
        self._open[call.result], self._offsets[call.result] = node, 0

    def _on_handle(self, call: Call, family: str) -> None:
        handle = call.arguments[0]
        assert isinstance(handle, Handle), call
        path = self._inside(handle.path)
        if path is None:
            return
        node = self._open.get(handle.number)
        node = self._find(path) if node is None else node
        assert node is not None, f"the model has no {path!r}"
        if family in ("fsync", "fdatasync"):
            self._synced(node, call)
            return
        if family == "ftruncate":
            self._written.append(Written(call.start, call.end, node, int(str(call.arguments[1])), None))
            return
        data = call.arguments[1]
        assert isinstance(data, bytes), call
        if family in ("pwrite", "pwritev"):
            offset = int(str(call.arguments[3]))
        else:
            offset = self._offsets.get(handle.number, 0)
            self._offsets[handle.number] = offset + call.result
        self._written.append(Written(call.start, call.end, node, offset, data[: call.result]))

    def _names_changed(self, call: Call, family: str) -> None:
        places = [at for at, one in enumerate(call.arguments) if isinstance(one, bytes)]
        with_handle = [at - 1 if at and isinstance(call.arguments[at - 1], Handle) else at for at in places]
        paths = [self._path_of(call, at) for at in with_handle]
        inside = [path for path in paths if path is not None]
        if not inside:
            return
        assert len(inside) == len(paths), f"from or to another directory: {call}"
        assert "RENAME_EXCHANGE" not in str(call.arguments), f"not followed: {call}"
        if family == "mkdir":
            node = next(self._next)
            self._directories.add(node)
            self._change(call, None, (*self._entry(inside[0]), node))
        elif family in ("unlink", "rmdir"):
            self._change(call, self._entry(inside[0]), None)
        else:
            moved = self._find(inside[0])
            assert moved is not None, f"the model has no {inside[0]!r}"
            gone = self._entry(inside[0]) if family == "rename" else None
            made = (*self._entry(inside[1]), moved)
            if gone is not None and gone[0] != made[0]:  # two directories, which are not synced together
                self._change(call, gone, None)
                gone = None
            self._change(call, gone, made)

    def _change(self, call: Call, gone: tuple[int, str] | None, made: tuple[int, str, int] | None) -> None:
        (folder,) = {entry[0] for entry in (gone, made) if entry is not None}
        change = Named(call.start, call.end, folder, gone and gone[1], made and made[1:])
        change.onto(self._names)
        self._named.append(change)

    def _synced(self, node: int, call: Call) -> None:
        """What had ended on a file or directory when its sync began is on the disk when the sync has ended."""
        on_it: list[Change] = [one for one in self._written if one.file == node]
        on_it += [one for one in self._named if one.folder == node]
        for change in on_it:
            if change.end < call.start:
                change.synced = min(change.synced, call.end)

    # --- what a disk can hold ----------------------------------------------------------------------------------

    @property
    def cuts(self) -> list[int]:
        """The moments that differ: at which a change began, or was on the disk at the latest."""
        changes: list[Change] = [*self._written, *self._named]
        moments = {one.start for one in changes} | {one.synced for one in changes if one.synced != _NEVER}
        return sorted(moments | {end for end, _ in self.marks})

    def whole(self) -> Tree:
        """What the program itself saw at the end."""
        return self._tree(_NEVER, self._named, {})

    def states(self, cut: int, most: int, dice: random.Random) -> Iterator[Tree]:
        """What the disk can hold after a power cut at a moment: all states if they are few, or extremes and a sample.

        Args:
          cut: the moment.
          most: all states if there are no more than this; else so many are drawn (some may be equal), beside extremes.
          dice: draws the sample.
        """
        named = [one for one in self._named if one.start <= cut]
        sure = [one for one in named if one.synced <= cut]
        open_names = [one for one in named if one.synced > cut]
        files = sorted({one.file for one in self._written if one.start <= cut < one.synced})
        for kept_names, kept_data in _choices(open_names, files, most, dice):
            chosen = set(map(id, kept_names)) | set(map(id, sure))
            yield self._tree(cut, [one for one in named if id(one) in chosen], kept_data)

    def _tree(self, cut: int, named: Iterable[Named], kept: dict[int, Kept]) -> Tree:
        names: dict[int, dict[str, int]] = {}
        for change in named:
            change.onto(names)
        tree: Tree = {}
        left: list[tuple[str, int]] = [("", 0)]
        while left:
            path, node = left.pop()
            for name, below in names.get(node, {}).items():
                inner = f"{path}{name}"
                if below in self._directories:
                    tree[inner] = None
                    left.append((f"{inner}/", below))
                else:
                    tree[inner] = self._content(below, cut, kept.get(below, "all"))
        return tree

    def _content(self, file: int, cut: int, kept: Kept) -> bytes:
        changes = [one for one in self._written if one.file == file and one.start <= cut]
        key = (file, kept, tuple(one.synced <= cut for one in changes))
        if key not in self._contents:
            old, new = bytearray(), bytearray()
            for one in changes:
                one.onto(new)
                if one.synced <= cut:
                    one.onto(old)
            zeros = (old + bytes(max(0, len(new) - len(old))))[: len(new)]
            half = max((len(new) + 1) // 2, len(old) if new.startswith(old) else 0)
            results = {"all": new, "none": old, "zeros": zeros, "half": new[:half]}
            self._contents[key] = bytes(results[kept])
        return self._contents[key]


def _choices(
    names: Sequence[Named], files: Sequence[int], most: int, dice: random.Random
) -> Iterator[tuple[Sequence[Named], dict[int, Kept]]]:
    """Which names, and how much of which files' data, have reached the disk."""
    if 2 ** len(names) * len(KEPT) ** len(files) <= most:
        for bits in itertools.product((True, False), repeat=len(names)):
            for kept in itertools.product(KEPT, repeat=len(files)):
                yield list(itertools.compress(names, bits)), dict(zip(files, kept, strict=True))
        return
    whole: dict[int, Kept] = {}
    extremes: list[tuple[Sequence[Named], dict[int, Kept]]] = [(names, dict.fromkeys(files, kept)) for kept in KEPT]
    extremes += [((), whole)]
    rest: list[tuple[Sequence[Named], dict[int, Kept]]] = []
    for at in range(len(names)):
        rest.append(([*names[:at], *names[at + 1 :]], whole))  # one name lost
        rest.append(([names[at]], whole))  # one name kept
        rest.append((names[:at], whole))  # a beginning of them, as a journal would have it
        rest.append((names[at:], whole))
    for file in files:
        rest += [(names, {file: kept}) for kept in KEPT if kept != "all"]
    for _ in range(most):
        rest.append(([one for one in names if dice.random() < 0.5], {file: dice.choice(KEPT) for file in files}))
    yield from extremes
    yield from dice.sample(rest, min(len(rest), most))


def _shown(argument: bytes | Handle) -> str:
    return argument.path if isinstance(argument, Handle) else argument.decode(errors="replace")


def below(tree: Tree, folder: str) -> Tree:
    """What a tree has in a directory."""
    return {path.removeprefix(f"{folder}/"): data for path, data in tree.items() if path.startswith(f"{folder}/")}


def built(tree: Tree, folder: Path) -> Path:
    """Makes the files of a tree in a new directory."""
    folder.mkdir(parents=True)
    for path, data in sorted(tree.items(), key=lambda item: item[0].count("/")):
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)
    return folder
