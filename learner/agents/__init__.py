"""Agents: runs the user's agents against sessions of the rollout servers. Nothing private of TRL."""
