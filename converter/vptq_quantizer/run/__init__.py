"""A run from a dense model to a checkpoint: its parts, its files, its report."""
