"""LoRA files: read and written in the formats people use, checked by their readers' rules, merged, resized, applied."""
