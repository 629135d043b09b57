"""Checkpoints: states to disk and back.

`save` writes and `restore` reads.  Both use `format`: `records` (which leaf is what), `layout` (where it goes) and
`manifest` (what a checkpoint records about itself).  `match` compares a target with a manifest before anything is read,
and `restore_report` says what happens to each leaf.  `orbax` has the handler that Orbax calls; `checkpointable` and
`checkpoints` are built on it.  `interop` converts other formats, `diff` compares.
"""
