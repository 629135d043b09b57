"""What any code has done to a model: every leaf's fingerprint before and after, compared.

The files: `fingerprints` (64 bits that stand for an array's bits, made where the array lies), `snapshots` (a model's
leaves with their fingerprints, at one moment), `seen` (two snapshots compared, and how that is told), `watching`
(`watch` itself).
"""
