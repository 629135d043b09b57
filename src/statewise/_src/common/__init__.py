"""What every other package uses: paths, tables, NNX's graph, and all that differs between versions.

The files:

- leaves: `paths` (a leaf's path, and the row that describes it), `ties` (its other paths), `compare` (how two leaves
  differ), `problems` (leaves and what is wrong with them, for one error), `tables` (how they are displayed);
- objects: `nnx_graph` (reads a model and rebuilds it), `known_graph` (reads one that is as it was before), `graphdef`
  (a graph definition taken apart), `nested_state` (`nnx.State` or dicts), `variable_forms` (plain, hijax, references),
  `object_names` (several objects), `write_values` (writes into live objects);
- values and code: `narrowing` (casts that lose numbers), `codes` (code objects);
- versions: the package `compat`.
"""
