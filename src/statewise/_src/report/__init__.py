"""Reports: one page that shows a model, a plan, a state or a checkpoint, and how it differs from another.

`gather` reads the leaves and their placement, `report` combines the results of the other tools (census, memory, lint,
diff), and `page` writes one self-contained HTML file, which needs no network and no other file.  The HTML, the style
and the scripts are files in `assets`.
"""
