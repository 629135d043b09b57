"""Looking at a model by filters; and NNX's split, merge and update, checked.

Several objects are given as a tuple or a list, `sw.count((model, optimizer), nnx.Param)`; filters then see paths
relative to each object, and results hold them under the object's position.

The files: `looking` (which leaves a filter means, how many they are, and why), `parts` (taking a model apart and
putting it together again).
"""
