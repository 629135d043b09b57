"""Two models, states or checkpoints compared, leaf by leaf.

The files: `diff` (the verb), `sources` (its two sides), `foreign` (files of other programs as a side), `result`.
"""
