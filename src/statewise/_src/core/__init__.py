"""The public objects, `Kinds`, `Plan` and `State`, and what can be done with a state."""
