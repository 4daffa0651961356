"""Middleware and request bodies."""
