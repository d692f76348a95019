"""From prompts to checked completions. Nothing private of TRL."""
