"""Meshes, and the sharding of each array on one."""
