"""Sentencepiece's scored pieces as the ranked merges of a BPE.

Sentencepiece joins whichever neighbours make the piece with the best score. A BPE joins by rank. The same
comes out when every way to make a piece out of two others is a merge, ranked by the piece's score.
"""

from collections.abc import Mapping


def merges_of_pieces(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges, the best first, for pieces with their scores (higher is better)."""
    found: list[tuple[float, int, tuple[str, str]]] = []
    for piece, score in scores.items():
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, -cut, (left, right)))
    found.sort(key=lambda entry: entry[:2])
    return [pair for _, _, pair in found]
