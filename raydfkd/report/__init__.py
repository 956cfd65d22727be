"""Metrics, report and pictures that a run leaves for people."""
