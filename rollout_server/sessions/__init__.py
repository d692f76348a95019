"""Conversations of agents as they were sampled; no HTTP."""
