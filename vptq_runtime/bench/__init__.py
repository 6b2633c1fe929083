"""vptq-bench: how fast a model runs here."""
