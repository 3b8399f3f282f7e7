"""Where a run's numbers go: metric names, the run folder, trackers and the terminal."""
