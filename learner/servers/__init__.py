"""Rollout servers: client, discovery, health, routing. No torch."""
