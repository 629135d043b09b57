"""Looking without changing: select, census, memory, audit, watch, lint."""
