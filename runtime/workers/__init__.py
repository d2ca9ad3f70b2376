"""Computation of a step: the executor, the rank worker, the decoder and its weights."""
