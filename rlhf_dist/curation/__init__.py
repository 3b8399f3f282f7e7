"""Making data: instruction records and preferences out of labelled sets, models and people."""
