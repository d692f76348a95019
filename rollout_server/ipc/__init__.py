"""JSON lines between the server and vLLM's workers: over Unix sockets, or TCP on a Ray cluster. No torch."""
