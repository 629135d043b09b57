"""What every other package uses: paths, tables, NNX's graph, and all that differs between versions.

The files:

- leaves: `paths` (a leaf's path, and the row that describes it), `ties` (its other paths), `compare` (how two leaves
  differ), `problems` (leaves and what is wrong with them, for one error), `tables` (how they are displayed);
- objects: `nnx_graph` (reads a model and rebuilds it), `graphdef` (a graph definition taken apart), `known_graph` (the
  leaves of objects with a known definition), `nested_state` (`nnx.State` or dicts), `variable_forms` (plain, hijax,
  references), `object_names` (several objects), `write_values` (writes into live objects);
- values and code: `narrowing` (casts that lose numbers), `placing` (devices of several processes), `copying` (many
  arrays), `numbers` (whole numbers), `codes` (code objects);
- versions: the package `compat`.
"""
