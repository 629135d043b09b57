"""What a step will do to a state, told before it runs.

The files: `rows` (the report: one row for each leaf, counts for each kind), `auditing` (`audit` itself).
"""
