"""The only modules that call Orbax and TensorStore.

The files:

- paths and stores: `paths`, `epath` (as Orbax takes them), `stores` (`gs://`, `s3://`), `store_errors`;
- arrays: `database` (OCDBT), `write`, `read`, `values` (large ones, read from a disk's files), `parts` (which process
  writes which part), `batching`, `flush` (to the disk), `plain` (checkpoints of other programs);
- items and steps: `state_writer` (a state with its manifest), `handler` and `item` (a state as an item of either
  interface), `data_item` (an iterator's position), `exchange` (how several processes write in the background),
  `manager` (the steps of a run) and its `options`, `store_steps` (in an object store), `progress`.
"""
