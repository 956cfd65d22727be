"""The same work on Ray; the only package that imports it."""
