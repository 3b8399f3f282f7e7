"""`rlhf-dist label`: a page on which people choose between responses, its export and its report."""
