"""Embedding and head of a base model as adapters see them: names, sizes, and trained rows. Needs no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VocabularyBase:
    """Embedding and head of a base model, [size, hidden] each."""

    embedding: str
    """Full name, as PEFT writes it: `model.embed_tokens`."""
    head: str
    tied: bool
    """True where the head is the embedding."""
    size: int
    hidden_size: int
    bytes_per_value: int
    """Bytes in which a value is served."""

    def named(self, name: str) -> Literal["embedding", "head"] | None:
        """The matrix that a name means, in full or from a dot on; None for another module's."""
        if f".{self.embedding}".endswith(f".{name}"):
            return "embedding"
        return "head" if f".{self.head}".endswith(f".{name}") else None

    def full_name(self, kind: str) -> str:
        return self.embedding if kind == "embedding" else self.head

    def bytes_of(self, rows: int) -> int:
        """Bytes of this number of rows as they are served."""
        return rows * self.hidden_size * self.bytes_per_value

    def file_bytes(self, served: int) -> int:
        """Most bytes of a file with rows that take `served` bytes: PEFT may write float32, and three copies."""
        return 3 * served * 4 // self.bytes_per_value


@dataclass(frozen=True, kw_only=True)
class RowTargets:
    """The rows that a recipe trains."""

    embedding: tuple[int, ...] = ()
    """Ids, ascending."""
    head: tuple[int, ...] = ()
    copies: tuple[str, ...] = ()
    """The matrices that are trained whole: embedding, head."""
    size: int = 0
    """Number of ids, those of new tokens included: rows of whole copies."""
    fresh: tuple[int, ...] = ()
    """Ids of new tokens, ascending: their rows do not begin as the base's."""
    tied: bool = False
    """The head has the embedding's rows."""

    def ids(self, kind: str) -> tuple[int, ...]:
        """Ids of the trained rows of the embedding or the head; empty where none are."""
        if kind in self.copies:
            return tuple(range(self.size))
        return self.embedding if kind == "embedding" else self.head

    @property
    def kinds(self) -> tuple[str, ...]:
        """The matrices with parameters of their own."""
        kinds = ("embedding",) if self.tied else ("embedding", "head")
        return tuple(kind for kind in kinds if self.ids(kind))

    @property
    def rows(self) -> int:
        """Number of trained rows."""
        return sum(len(self.ids(kind)) for kind in self.kinds)
