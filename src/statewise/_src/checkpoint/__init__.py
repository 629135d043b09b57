"""Keeping: states to disk and back.

`saving` writes, `restoring` reads; both go through `records` (which leaf is what, and where it goes) and `manifest`
(what a checkpoint says of itself).  `matching` compares a target with a manifest before anything is read, `report`
says what came of it.  `handler` is the part that Orbax calls; `items` and `managed` stand on it.  `converting` goes to
other formats and back, `differing` compares.
"""
