"""Making data: instruction records and preferences out of labeled sets, models and people."""
