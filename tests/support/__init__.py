"""What tests of several folders share. `tests/` is on the import path, because its conftest.py lies there."""
