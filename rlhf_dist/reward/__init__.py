"""Reward modelling: configuration, loss, trainer, worker, roles, construction."""
