"""Checkpoints of other programs: read, written and converted.

The files:

- the verb: `convert`;
- reading: `open` (any checkpoint as a `Source`), `sources`, `foreign`, `recognize` (files that are none),
  `safetensors`, `several_files`, `adapter_folder` (peft's);
- other names: `named` (a source of other names as one of ours), `fit_names`, `match` (a source with a target);
- arrays: `read_range` (a part of a file), `fill` (a part of one of ours, from theirs), `placed` (onto devices);
- writing: `export`, `export_folder` (as models are published).
"""
