"""Hugging Face models as this package runs them: loading, and the two forward passes (log-probs, scalars)."""
