"""Looking without changing: select, census, memory, audit, watch, lint.

`select`, `audit`, `watch` and `lint` are packages.  The files: `census`, `memory`, and two that the others use,
`positions` (those that a restart leaves behind) and `kind_hints` (kinds as code).
"""
