"""Programs to read and copy: `multi_state`, the smallest model with four kinds of state, and `demo`, a complete job."""
