"""JSON lines between the server and vLLM's workers: over Unix sockets, or over TCP to other hosts. No torch."""
