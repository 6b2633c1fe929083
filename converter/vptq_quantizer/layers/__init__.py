"""One linear layer: codebooks, the choice of indices, fine-tuning."""
