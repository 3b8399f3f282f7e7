"""Distributed RLHF: instruction tuning, reward modeling and PPO on Ray and DeepSpeed."""

__version__ = "0.1.0"
