"""Which of the tokens that were sampled along a draft stand.

The first token of a row is sampled after tokens that are certain, the next one after the draft's first guess,
and so on. Each draws with the number that belongs to its own position, so a token stands exactly when every
guess before it is what was sampled there: the output is the one that would have come without a draft, token by
token (a special case of arXiv:2211.17192, in which the draft's distribution has one point).
"""

from collections.abc import Mapping


def proved_right(slots: list[int], tokens: list[int], drafts: Mapping[int, list[int]]) -> list[int]:
    """Indices of the tokens that stand. `slots` and `tokens` go by position within each slot; a slot without a
    draft has one token, which stands."""
    if not drafts:
        return list(range(len(slots)))
    kept: list[int] = []
    seen: dict[int, int] = {}
    wrong: set[int] = set()
    for index, (slot, token) in enumerate(zip(slots, tokens, strict=True)):
        if slot in wrong:
            continue
        kept.append(index)
        place = seen[slot] = seen.get(slot, -1) + 1
        draft = drafts.get(slot, [])
        if place < len(draft) and token != draft[place]:
            wrong.add(slot)
    return kept
