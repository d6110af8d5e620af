"""`ra3 ...` commands."""
