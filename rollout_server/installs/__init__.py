"""A push, in the server process."""
