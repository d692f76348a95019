"""Who serves what: runs, slots, the served model. One event loop, no I/O."""
