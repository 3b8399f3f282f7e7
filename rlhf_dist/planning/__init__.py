"""What a run needs, before anything starts: memory, time, placement; and what this machine has."""
