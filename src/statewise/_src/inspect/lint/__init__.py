"""Lint: likely mistakes in the state of an NNX program, found before it runs.

The files:

- `lint` (`lint` itself, and the list of all rules), `finding` (the results), `subject` (the model that rules look at),
  `training` (what updates it), `read_values` and `class_code` (what rules read of arrays and of classes);
- the rules, by theme: `values`, `arrays`, `leaf_types`, `sowing`, `declared` (the kinds), `statistics`, `constants`,
  `optimizers`, `hooks`, `restarts`, `members` (ensembles).
"""
