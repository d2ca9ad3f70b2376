"""Requests and a training job on one machine: in one process of ours, and in two. See `__main__`."""
