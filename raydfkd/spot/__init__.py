"""Spot machines: their clouds' notices, and what is done about one."""
