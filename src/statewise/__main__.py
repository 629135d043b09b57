"""`python -m statewise` is the command `statewise`."""

from statewise.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
