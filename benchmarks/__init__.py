"""Measurements by hand: not run by the tests, and no part of what is installed."""

# Before torch, which reads what this sets once: its waiting threads would take cores from the C++ ops for longer than
# they do in a server.
import runtime as runtime
