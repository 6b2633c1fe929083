"""Training of the whole model."""
