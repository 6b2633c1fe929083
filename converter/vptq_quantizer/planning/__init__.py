"""What each matrix of a model is quantised to: by hand, or for a size."""
