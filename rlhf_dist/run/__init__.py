"""One run: folder, checkpoints, trackers, metrics, console, preemption, lineage."""
