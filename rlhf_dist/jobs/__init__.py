"""Runs as jobs of a Ray cluster or of Slurm."""
