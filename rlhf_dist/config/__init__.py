"""The schemas that every command shares, and the loader. Nothing here imports torch."""
