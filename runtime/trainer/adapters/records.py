"""The nouns of the library, as they are stored and shown."""

from typing import Any

from msgspec import Struct, field

from runtime.trainer.adapters.names import checkpoint_name


class Version(Struct, frozen=True, kw_only=True):
    """One immutable state of an adapter."""

    name: str
    number: int
    """From 1, rising, and never used again for this name."""
    key: str
    """`name@number:digest`: unique for ever. What the engine and the KV cache know it by."""
    created: float
    """Unix time."""
    rank: int
    base: str
    """Fingerprint of the base model that it is for."""
    sha256: str
    """Of its files."""
    job: str | None = None
    """The training job that made it; None when it came from elsewhere."""
    step: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}@{self.number}"


class CheckpointVersion(Version, frozen=True, kw_only=True):
    """What a running job had learned at a step, which is its number."""

    @property
    def id(self) -> str:
        return checkpoint_name(self.name, self.number)


class Canary(Struct, frozen=True):
    """A version that gets a share of the requests for its name."""

    version: int
    weight: float
    """From 0 to 1."""


class AdapterRecord(Struct, frozen=True, kw_only=True):
    """A name, and what it points to."""

    name: str
    created: float
    current: int
    served: bool
    """False: unloaded by hand; its versions are kept, and nobody can ask for it."""
    versions: dict[int, Version]
    canary: Canary | None = None
    aliases: tuple[str, ...] = ()

    @property
    def version(self) -> Version:
        return self.versions[self.current]


class Catalogue(Struct, frozen=True):
    """Everything in the library at one moment."""

    adapters: dict[str, AdapterRecord] = {}
    aliases: dict[str, str] = {}
    """Alias → name."""

    def find(self, name: str) -> AdapterRecord | None:
        return self.adapters.get(self.aliases.get(name, name))
