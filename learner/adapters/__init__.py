"""What a LoRA adapter is, live in a model or stored on disk."""
