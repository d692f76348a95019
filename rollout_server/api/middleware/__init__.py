"""ASGI layers around all routes."""
