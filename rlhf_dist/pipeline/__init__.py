"""`rlhf-dist pipeline`: the stages of a whole job, keyed by content."""
