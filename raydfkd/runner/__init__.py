"""One run from the recipe to the report."""
