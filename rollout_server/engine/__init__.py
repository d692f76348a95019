"""Everything between a request and AsyncLLM."""
