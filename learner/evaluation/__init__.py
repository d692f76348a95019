"""Scores policies over HTTP. No TRL."""
