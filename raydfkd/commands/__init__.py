"""The commands, a module for each kind. Torch and Ray are imported once a recipe shows no mistake by itself."""
