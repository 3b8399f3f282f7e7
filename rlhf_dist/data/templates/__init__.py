"""Templates that render rows of labelled data sets as instruction records."""
