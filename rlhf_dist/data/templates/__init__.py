"""Templates that render rows of labeled data sets as instruction records."""
