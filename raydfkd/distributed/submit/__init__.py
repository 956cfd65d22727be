"""Runs as jobs of a cluster elsewhere."""
