"""`rlhf-dist submit`: a run as a job of a Ray cluster or of Slurm."""
