"""Supervised fine-tuning: configuration, trainer, roles, construction."""
