"""Builders of the big networks."""
