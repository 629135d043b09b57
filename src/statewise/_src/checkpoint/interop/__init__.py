"""Checkpoints of other programs: read, written and converted."""
