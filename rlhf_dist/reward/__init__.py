"""Reward modeling: configuration, loss, trainer, worker, roles, construction."""
