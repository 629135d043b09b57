"""What the leaves of a model are called in other programs' files, and how their arrays are laid out there.

The files:

- names: `names` (of every leaf), `name` (of one), `template` (`layers/{i}/kernel`);
- arrays: `pattern` (the notation of einops), `layout` (where an array is found there), `pieces` (a part of one);
- proposed names: `infer`, and for it `modules` (arrays grouped), `words` (how alike two names are), `shapes` (which
  patterns fit), `assign` (the best pairs), `proposal` (the result, as code).
"""
