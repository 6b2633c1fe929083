"""vptq-run, and what all commands have in common."""
