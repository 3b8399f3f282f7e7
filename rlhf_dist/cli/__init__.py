"""Command line: arguments in, a call, an exit code out."""
