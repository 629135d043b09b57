"""Filters applied to a model; and NNX's split, merge and update, checked.

Several objects are passed as a tuple or a list, `sw.count((model, optimizer), nnx.Param)`; filters then see paths
relative to each object, and results list leaves under the object's position.

The files: `select` (which leaves a filter matches, how many, and why), `parts` (a model split and merged),
`new_values` (the values that `update` writes).
"""
