"""The only modules that call Orbax and TensorStore."""
