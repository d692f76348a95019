"""Runs in vLLM's worker processes: writes adapters into slots and weights."""
