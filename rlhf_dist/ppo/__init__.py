"""PPO with a KL penalty and a pretraining-mix term: configuration, formulas, trainer, workers, roles, construction."""
