"""Meshes, and what each array's sharding on one is."""
