"""`rlhf-dist data`: the commands that make and show data."""
