"""What tests share. Nothing imports from a `test_*.py`."""
