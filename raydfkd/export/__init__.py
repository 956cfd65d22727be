"""Students and transfer sets in forms that need no raydfkd."""
