"""Lint: likely mistakes in the state of an NNX program, found before it runs."""
