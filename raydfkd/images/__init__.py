"""Pixels: spaces, augmentations, real images."""
