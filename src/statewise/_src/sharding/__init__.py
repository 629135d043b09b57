"""Meshes, and the sharding of each array on one.

The files: `resolve` (the placements of a plan on a mesh), `array_placement` (of one array, and of a moment that follows
it), `annotations` (`sw.FromMetadata`), `ensembles`, `part_shardings` (of the arrays in a state), `mesh` (its axes,
devices and memories), `explicit_axes` (axes of type `Explicit`), `device_put` (one array to other devices).
"""
