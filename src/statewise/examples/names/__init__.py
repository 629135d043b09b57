"""Models that others published, each a small NNX model of our own and its `sw.Names`: to read, copy and change."""
