"""Versions, paths, tables and NNX's graph: which every other package uses."""
