"""vptq-perplexity: how good a model is."""
