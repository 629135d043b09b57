"""Versions, paths, tables and NNX's graph: what every other package stands on."""
