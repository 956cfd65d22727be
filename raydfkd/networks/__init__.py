"""Networks: built, loaded, observed."""
