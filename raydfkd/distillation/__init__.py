"""Training and judging the student."""
