"""The page at /, without a browser."""
