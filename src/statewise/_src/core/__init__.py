"""The public objects, `Kinds`, `Plan` and `State`, and what can be done with a state.

`plan` has the three; each other file has one thing that can be done with them.  The files:

- the objects: `plan` (all three), `kinds` and `state_data` (what `Kinds` and `State` inherit), `part` (one kind's
  arrays), `view` (`state["cache"]`), `templates` (states without arrays);
- models: `model_io` (`take`, `put`, `build`), `check_objects` (that they fit the plan);
- new values: `restart`, `restart_targets` (what it renews), `restart_slots`; `cast`; `averages` (swapped in,
  restarted); `reduce_devices`; `merge_lora`, `adapters` (which kernel each belongs to);
- many arrays: `many_arrays` (what is compiled in pieces);
- other plans: `plan_difference` (whose states fit, and how others differ); `transfer`, `transfer_match` and
  `transfer_names` (which leaf is which), `transfer_arrays` and `transfer_layouts` (the copies);
- many states: `ensembles`, `member_view` (one member, inside `jax.vmap`), `vmap_axes` (`plan.axes`), `batches` (what
  `jax.vmap` makes under the plan of one model);
- what is known of values: `usable` (not abstract, traced or donated), `versions` (stale kinds), `known_arrays` (arrays
  that left a state).
"""
