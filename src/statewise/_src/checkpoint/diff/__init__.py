"""Two models, states or checkpoints compared, leaf by leaf."""
