"""Functions on states: traced, checked against what they may write, and compiled."""
