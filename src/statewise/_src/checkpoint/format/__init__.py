"""Statewise's own format: the manifest, keys, records and checksums."""
