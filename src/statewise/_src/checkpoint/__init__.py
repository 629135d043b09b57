"""Checkpoints: states to disk and back.

The files:

- the verbs: `save`, `restore` (with `preview` and `inspect`), `checkpoints` (a checkpoint for each step),
  `checkpointable` (an item of Orbax's own managers), `names` (what leaves are called elsewhere);
- saving: `temporary` (where it is written on a disk until it is complete), `store_commit` (when a checkpoint in an
  object store is complete), `together` (several processes);
- restoring: `match` (a target with a checkpoint, before anything is read) and `match_names` (with files of other
  names), `compare_records` (a leaf with its record), `renested` and `retyped` (leaves that all differ for one reason),
  `members` (of an ensemble), `fill` (values that are not read), `restore_report` (what happens to each leaf);
- steps: `items` (what is written beside a state), `step_items` (what is read beside it, and what its manifest records
  of the step), `data` (the position of an iterator), `claimed` (who writes a step), `step_errors`, `restore_result`;
- packages: `format` (Statewise's own), `orbax` (all that calls Orbax and TensorStore), `interop` (other programs'
  files), `diff`.
"""
