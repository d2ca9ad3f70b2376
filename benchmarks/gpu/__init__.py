"""Check of a machine with a GPU: ops, tokens, training, and speed beside what the device reaches alone."""
