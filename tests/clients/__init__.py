"""Clients that people use, unmodified, against a server with a real model.

They live in environments of their own: .ci/clients makes these, and runs the tests.
"""
