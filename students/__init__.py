"""Builders of the small networks."""
