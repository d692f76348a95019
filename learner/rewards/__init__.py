"""Runs the user's reward functions, within limits."""
