"""Evaluation of saved and of trained models on held-out records."""
