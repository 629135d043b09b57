"""Statewise's own format: the manifest, keys, records and checksums.

The files:

- writing: `records` (which leaf is what), `layout` (where each array goes in Orbax's tree), `keys` (names on disk),
  `checksums`, `per_device` (values that differ by device), `manifest`;
- reading: `locate` (a checkpoint and its base), `parse` (a manifest, each field checked), `files` (that they are what
  was written), `load` (the leaves), `integrity` (which leaves are corrupted).
"""
