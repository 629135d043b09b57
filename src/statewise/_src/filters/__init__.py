"""Filters: which leaves are meant.

Every NNX filter is a filter here: a type, a tag, `...`, a callable of (path, leaf), tuples and lists of these,
`nnx.All`, `nnx.Any`, `nnx.Not` and their kin.  This package adds four that NNX lacks, `Exactly`, `Path`, `Meta` and
`Where`, and the operators `&`, `|` and `~` between any of them.  They are callables of (path, leaf), frozen, hashable
and equal by value, so they work wherever NNX takes a filter: `nnx.state`, `nnx.split`, `nnx.pop`,
`nnx.Optimizer(wrt=...)`, `nnx.All(...)`, keys of a mapping.

The other packages mostly use these functions, each of which takes a filter of any sort:

- `normalize`: the same filter, hashable and equal by value; rejects what is not a filter;
- `predicate`: the filter as one callable of (path, leaf), which fails with the leaf's path;
- `describe` and `as_code`: the filter as short text, and as code for a hint;
- `explain_leaf`: whether it matches one leaf, and which part of it decided;
- `type_only` and `type_key`: whether the answer depends on a leaf's type alone, and the key under which to cache it.
  A plan uses this to evaluate each filter once per type rather than once per leaf.

The files: `combinators` (what a filter is, how filters are combined, and `normalize`, `predicate`, `describe`),
`primitives` (the four), `explain` (`explain_leaf`, `as_code`, `type_only`, `type_key`), `values` (text and equality of
the values in filters).
"""
