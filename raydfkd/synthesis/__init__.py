"""From a frozen teacher to labelled synthetic images."""
