"""The effects of any code on a model: every leaf's fingerprint before and after, compared.

The files: `fingerprints` (64 bits that represent an array's bits, computed where the array is), `snapshot` (a model's
leaves with their fingerprints, at one moment), `result` (two snapshots compared), `watch` (`watch` itself).
"""
