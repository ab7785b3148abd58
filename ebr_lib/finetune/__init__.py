"""Stage 1: fine-tune an embedding model on pairs, with LoRA."""
