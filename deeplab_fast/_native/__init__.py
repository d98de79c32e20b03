"""The compiled module and what prepares calls of it."""
