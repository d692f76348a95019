"""JSON lines over a Unix socket, between the server and vLLM's workers. No torch."""
