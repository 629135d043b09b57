"""Lint: what is likely to be wrong with the state of an NNX program, found before it runs."""
