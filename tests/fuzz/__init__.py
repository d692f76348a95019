"""Requests that nobody would send: what a rollout server must refuse without breaking. `python -m tests.fuzz`."""
