"""Terms of the objective and the objective itself."""
