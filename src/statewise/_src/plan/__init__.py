"""The plan: kinds matched to leaves, and the static tables that say where each array of a state is.  No arrays.

The files:

- what is declared: `kind`, `placements`, `ema`, `overwrite` (an optimizer), `depends_on`, `fresh_values` (restarts);
- from there to a plan: `resolve` (all of it), `match` (each leaf to one kind), `spelled_paths` (paths that match
  nothing), `leaf_specs` (the rows), `known_models` (rows of an equal model), `intern` (equal plans are one
  object);
- the plan: `tables` (all of it), `arrays` (the index of its arrays), `packing`, `per_device`, `members` (ensembles);
- derived arrays: `derived` (the base class), `optimizer_state`, `averages`, `elementwise` (which optimizers may be
  packed).
"""
