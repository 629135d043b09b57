"""Commands: `census | plan | explain | memory | lint | report TARGET`, `inspect | convert | diff | names`, `demo`.

A target is a function without arguments that makes a model, `package.module:factory` or `file.py:factory`; a model
itself, or a tuple of objects, also works.  Exit status: 0 for success, 1 for findings (such as leaves that no kind
claims), 2 for wrong usage, with one line that says what is wrong.

This module imports nothing heavy, so that `--help` is instant.  The others: `options` (the parser), `commands` (what
each command does), `checkpoints` (the requests of those on checkpoints), `targets` (from text to objects),
`expressions` (from text to filters).
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence

from statewise.cli.options import build_parser

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments, without the program's name; those of the process if None.

    Returns:
      the exit status: 0 for success, 1 for findings, 2 for wrong usage; for `diff` also 2 if a checkpoint is corrupted.

    Raises:
      SystemExit: after `--help`, and if the arguments cannot be parsed.

    Example:
      >>> from statewise.cli import main
      >>> main(["explain", "statewise.examples.multi_state:missing", "..."])
      2
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A file name may contain bytes or letters that the terminal's encoding lacks: they are escaped.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if args.version:
            from statewise import __version__

            print(f"statewise {__version__}")
            return 0
        if args.command is None:
            parser.error("no command given")
        from statewise.cli.commands import run

        status = run(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # `statewise plan ... | head`: the reader has closed the pipe.  Buffered output goes to /dev/null, so that the
        # interpreter does not fail on it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status
