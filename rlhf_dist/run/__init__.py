"""One run: folder, checkpoints, trackers, metrics, console, pre-emption, lineage."""
