"""The embedded default: data made from human word ratings, a tiny model, and the recipes of the quickstart."""
