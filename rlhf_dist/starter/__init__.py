"""The embedded default: starter data made from human word ratings, a tiny model, and the quickstart's recipes."""
