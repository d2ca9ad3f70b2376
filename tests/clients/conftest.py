"""The clients' own tests run in other environments, see test_clients.py."""

collect_ignore = ["python", "node"]
