"""The plan: kinds matched to leaves, and the static tables that say where each array of a state is.  No arrays."""
