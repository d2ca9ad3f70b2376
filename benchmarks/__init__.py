"""Measurements by hand: not run by the tests, and no part of what is installed."""
