"""Forward and backward passes without padding: packing, shared prompts, LoRA as one product. Nothing private of TRL."""
