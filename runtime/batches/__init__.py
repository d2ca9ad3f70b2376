"""Batches of /v1/batches: files of requests, answered beside live traffic."""
