"""One picture grid of a LoRA at several strengths."""
