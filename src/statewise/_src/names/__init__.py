"""What the leaves of a model are called in other programs' files, and how their arrays are laid out there."""
