"""Dense models as llama.cpp stores them, one GGUF file or a split one, read as Hugging Face checkpoints."""
