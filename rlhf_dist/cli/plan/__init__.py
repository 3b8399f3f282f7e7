"""`rlhf-dist plan`: memory, placement and time of a run on paper."""
