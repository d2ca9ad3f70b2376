"""From a finished job's files to a version that is served: `jobs.ports.Publisher`."""

from collections.abc import Mapping
from pathlib import Path

from runtime.errors import NotFound
from runtime.trainer.adapters.library import AdapterLibrary


class LibraryPublisher:
    """Publishes into the library of this server."""

    def __init__(self, library: AdapterLibrary) -> None:
        self._library = library

    async def publish(self, *, name: str, source: Path, job_id: str, step: int, metrics: dict[str, float]) -> str:
        """See `jobs.ports.Publisher`: a job is published once, whatever crashed in between."""
        if (known := self._published(name, job_id)) is not None:
            return known
        version = await self._library.publish(name, source, job=job_id, step=step, metrics=dict(metrics))
        return version.id

    async def offer(self, *, name: str, job_id: str, folders: Mapping[int, Path]) -> None:
        """See `jobs.ports.Publisher`."""
        await self._library.offer(name, job_id, folders)

    def _published(self, name: str, job_id: str) -> str | None:
        try:
            versions = self._library.get(name).versions
        except NotFound:
            return None
        return next((version.id for version in versions.values() if version.job == job_id), None)
