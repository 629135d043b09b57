"""Which leaves: a filter says, leaf by leaf, whether it is meant.

Every NNX filter is a filter here: a type, a tag, `...`, a callable of (path, leaf), tuples and lists of
these, `nnx.All`, `nnx.Any`, `nnx.Not` and their kin.  This room adds four that NNX has no word for,
`Exactly`, `Path`, `Meta` and `Where`, and the operators `&`, `|` and `~` between any of them.  Ours are callables
of (path, leaf) themselves, frozen, hashable and equal by value, so that they work wherever NNX takes a
filter: `nnx.state`, `nnx.split`, `nnx.pop`, `nnx.Optimizer(wrt=...)`, `nnx.All(...)`, keys of a mapping.

The rest of the package needs seven functions, each of which takes a filter of any sort:

- `normalise`: the same filter, refused if it is none, hashable and equal by value if it is one;
- `predicate`: the filter as one callable of (path, leaf), which fails with the leaf's path;
- `describe` and `as_code`: the filter as short text, and as code for a hint;
- `explain_leaf`: whether it matches one leaf, and which part of it decided that;
- `type_only` and `type_key`: whether the answer depends on a leaf's type alone, and under which key to
  remember it.  A plan so asks each filter once per type rather than once per leaf.

The files: `values` (text and equality of what filters hold), `algebra` (what a filter is, and how filters are
joined), `words` (the four), `explain` (what can be said of a filter and a leaf).
"""
