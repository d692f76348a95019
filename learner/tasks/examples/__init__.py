"""Tasks to run as they are, and to copy from."""
