"""JSON lines between the server and vLLM's workers: over Unix sockets, or TCP between hosts. No torch."""
