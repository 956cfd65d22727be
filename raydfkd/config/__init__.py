"""Recipes as data: schema, names, options. Nothing here imports torch."""
