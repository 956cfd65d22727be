"""Spot machines' notices."""
