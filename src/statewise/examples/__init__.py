"""Programs to read and copy.

`multi_state` is the smallest model with four kinds of state, and `demo` a complete job.  `names` has models with the
names of their published weights, and `minilm` is a job on such weights.
"""
