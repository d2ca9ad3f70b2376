"""Tensor parallelism over processes: the ranks that share a model, and how the engine drives them.

The engine's process holds no weights. Every rank is a process of its own, so that one that dies or hangs can be ended,
and the whole group started again, whatever it was waiting for. Importing this package imports no torch.
"""
