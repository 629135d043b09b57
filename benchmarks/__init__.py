"""The numbers, side by side: `python -m benchmarks [--quick] [--only NAME ...]`.

Each workload runs in processes of its own, and there every rival runs the same model, optimizer and data, its
calls interleaved with the others'.  A rival is written as its own documentation advises, and what it computes is
compared with what ours computes before anything is timed.

The files: `case` (what is computed), `models` and `models_eqx` (the models), `styles` (the rivals: one way of
writing a step each), `compare` and `measure` (checks and clocks), `workloads` (what is measured), `report`,
`targets` and `plot` (JSON to Markdown and SVG), `__main__` (the command line).
"""
