"""From the `model` of a request to what answers it: the base model, or one version of an adapter."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.errors import ModelNotFound

if TYPE_CHECKING:
    from runtime.service import EngineService
    from runtime.trainer.adapters.records import Version

MAX_NAMED = 10
"""Models that an error names."""


@dataclass(frozen=True)
class Served:
    """What a request is for. Found once: the whole request keeps this version."""

    name: str
    """As the client called it; the answer calls it the same."""
    service: "EngineService"
    version: "Version | None" = None
    """None: the base model."""

    @property
    def key(self) -> str:
        """For `Submission.adapter`."""
        return self.version.key if self.version else ""

    async def ready(self) -> None:
        """Have it in memory. Submit before the next await, or it may be gone again.
        Raises `AdaptersBusy`, `AdapterUnavailable`."""
        if self.version is not None and self.service.adapters is not None:
            await self.service.adapters.ready(self.version)


def find_model(service: "EngineService", asked: str | None) -> Served:
    """What `asked` means: the base model's name (or None), an adapter's, an alias, `name@3` for one version, or
    `name:ckpt-step-20` for a checkpoint of a job that runs.
    Raises `ModelNotFound`."""
    if asked is None or asked == service.model_name:
        return Served(service.model_name, service)
    version = service.adapters.resolve(asked) if service.adapters else None
    if version is None:
        there = ", ".join(f"`{served.name}`" for served in every_model(service)[:MAX_NAMED])
        raise ModelNotFound(f"The model `{asked[:200]}` does not exist. This server has {there}.", param="model")
    return Served(asked, service, version)


def every_model(service: "EngineService") -> list[Served]:
    """Everything that can be asked for: the base first, then adapters, each followed by its aliases, then the
    checkpoints of running jobs."""
    found = [Served(service.model_name, service)]
    if service.adapters is not None:
        for record in service.adapters.list():
            if record.served and service.adapters.fits(record.version):
                found += [Served(name, service, record.version) for name in (record.name, *record.aliases)]
        found += [Served(version.id, service, version) for version in service.adapters.checkpoints()]
    return found
