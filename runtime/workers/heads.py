"""How attention's heads are shared out among ranks."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.workers.group import Group
from runtime.workers.spec import DecoderSpec
from runtime.workers.split import Split


@dataclass(frozen=True)
class Heads:
    """The heads that one rank computes. With more ranks than key/value heads, some hold the same one."""

    q: Split
    kv: Split

    @classmethod
    def of(cls, spec: DecoderSpec, group: Group) -> Heads:
        """Raises `ValueError` where the ranks cannot get equal shares."""
        heads, groups, ranks = spec.num_heads, spec.num_kv_heads, group.size
        if heads % ranks or (groups % ranks and ranks % groups):
            fits = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
            raise ValueError(
                f"{heads} attention heads over {groups} key/value heads cannot be shared evenly by {ranks} ranks; "
                f"parallel.tp can be {', '.join(map(str, fits))}"
            )
        kv = Split.even(groups, group.rank, ranks) if groups % ranks == 0 else _copied(groups, group)
        return cls(Split.even(heads, group.rank, ranks), kv)

    def qkv(self, spec: DecoderSpec) -> dict[str, int | Split]:
        """The outputs of the projection to query, key and value, in the checkpoint's layout."""
        q, kv = self.q.scaled(spec.head_dim), self.kv.scaled(spec.head_dim)
        if spec.qkv == "parts":
            return {"q": q, "k": kv, "v": kv}
        if spec.qkv == "fused":
            return {"": Split.joined([q, kv, kv])}
        return {"": self._grouped(spec.num_heads // spec.num_kv_heads).scaled(spec.head_dim)}

    def _grouped(self, each: int) -> Split:
        """Heads by key/value head: `each` of queries, one of keys, one of values."""
        ranges = []
        for held in self.kv.ranges:
            for group in held:
                first = group * (each + 2)
                mine = [head - group * each for head in self.q.ranges[0] if head // each == group]
                ranges.append(range(first + mine[0], first + mine[-1] + 1))
                ranges.append(range(first + each, first + each + 2))
        return Split(self.kv.full * (each + 2), tuple(ranges))


def _copied(groups: int, group: Group) -> Split:
    own = group.rank * groups // group.size
    return Split(groups, (range(own, own + 1),))
