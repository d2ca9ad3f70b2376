"""Beam search: the likeliest outputs of a prompt, followed side by side in blocks that they share."""

from runtime.beams.groups import BeamSearches
from runtime.beams.search import Branch, Hypothesis, Search

__all__ = ["BeamSearches", "Branch", "Hypothesis", "Search"]
