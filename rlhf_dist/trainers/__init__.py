"""The loops: supervised (SFT, reward model), PPO, evaluation. They know models only through `rlhf_dist.roles`."""
