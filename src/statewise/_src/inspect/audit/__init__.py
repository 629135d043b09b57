"""The effects of a step on a state, determined before it runs.

The files: `result` (one row for each leaf, counts for each kind), `audit` (`audit` itself).
"""
