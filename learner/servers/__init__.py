"""Talks to rollout servers: client, discovery, health, routing. No torch."""
