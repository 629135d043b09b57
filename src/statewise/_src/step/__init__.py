"""Functions on states: traced, checked against what they may write, and compiled.

The files, in the order in which a first call reaches them:

- the step: `decorators` (`@sw.step`, `@sw.train_step`), `step` (`Step`), `definition` (its function and contract, and
  the way to a compiled entry), `function` and `arguments` (what it is made of), `training` (the options of training);
- the trace: `trace` (the call), `compute` (the dtypes that the function sees), `capture` (what it sows or assigns),
  `effects` (what it reads and writes);
- the checks: `contract` (what it may write), `object_changes` (Variables that it made or removed), `passed_objects` and
  `outside_writes` (writes outside of the state), `closures` (objects that it reaches by itself),
  `lost_writes`, `dependence` (gradients that are always zero), `warnings` (that it trains something);
- the program: `program`, `operands` (the arrays that are passed), `train_program` (gradients, then updates),
  `step_update` (the update of each derived thing), `optimizer_update`, `average_update`, `microbatches`, `nonfinite`,
  `instruments` and `measured` (`measure=`), `staleness` (`depends_on`), `shard_map` and `replication` (per device);
- the call: `dispatch` (one compiled step), `aot` (`step.lower`).

Two more verbs run functions on modules, without a plan: `grad`, and `scan_layers` with `scan_modules` and `graft`.
`flow` follows facts forward through a jaxpr.
"""
