"""Report: one page that shows a model, a plan, a state or a checkpoint, and what it differs in from another.

`gathering` reads the leaves and where they lie, `reporting` puts together what the other instruments say (census,
memory, lint, diff), `page` writes it as one HTML file that needs nothing else: no network, no other file.  The HTML,
the style and the scripts are files in `assets`.
"""
