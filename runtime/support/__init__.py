"""Utilities for every part, independent of all parts: logs, durable files, threads, the database, failpoints."""
