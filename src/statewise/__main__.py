"""Runs the command `statewise` as `python -m statewise`."""

from statewise.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
