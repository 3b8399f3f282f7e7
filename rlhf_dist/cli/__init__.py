"""Command line: parsing arguments, and the wiring of configuration → roles → trainer."""
