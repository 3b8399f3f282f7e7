"""Sharded training and inference: the one place that touches DeepSpeed and torch.distributed."""
