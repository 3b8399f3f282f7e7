"""Schemas of `rlhf-dist data ...` and `rlhf-dist label`, one file a command."""
