"""Requests as jobs of the engine. No HTTP."""
