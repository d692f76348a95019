"""Example tasks to run and to copy."""
