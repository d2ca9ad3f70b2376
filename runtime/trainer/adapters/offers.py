"""What of a job that is still running can be asked for: the adapters of its checkpoints, as `name:ckpt-step-20`.

They are in no catalogue and in nobody's folder but the job's, and there are none when the process starts.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.logs import get_logger
from runtime.trainer.adapters.files import digest
from runtime.trainer.adapters.names import checkpoint_name
from runtime.trainer.adapters.records import CheckpointVersion
from runtime.workers.loading.peft import AdapterInvalid, read_files
from runtime.workers.loading.peft.config import parse_config
from runtime.workers.loading.peft.names import CONFIG
from runtime.workers.lora_base import LoraBase

_log = get_logger("adapters")


class Offers:
    """Belongs to the event loop; files are read on other threads."""

    def __init__(self, base: LoraBase, *, max_rank: int) -> None:
        self._base = base
        self._max_rank = max_rank
        self._offered: dict[str, tuple[CheckpointVersion, Path]] = {}
        """By what a request calls it."""

    def list(self) -> list[CheckpointVersion]:
        """All of them; a job's in the order of their steps."""
        return [version for version, _ in self._offered.values()]

    def find(self, model: str) -> CheckpointVersion | None:
        return self._offered[model][0] if model in self._offered else None

    def directory(self, name: str) -> Path | None:
        """Where the files of the one of this name are."""
        return self._offered[name][1] if name in self._offered else None

    async def replace(self, name: str, job: str, folders: Mapping[int, Path]) -> Sequence[CheckpointVersion]:
        """Offer what is in these folders, by their steps, as what the job called `name` has now. Returns those that
        it has no longer. A folder that cannot be read is logged, and not offered."""
        known = {version.number: version for version in self.list() if version.job == job}
        now = {
            step: known.get(step) or await asyncio.to_thread(self._read, name, job, step, folder)
            for step, folder in sorted(folders.items())
        }
        for version in known.values():
            del self._offered[version.id]
        for step, found in now.items():
            if found is not None:
                self._offered[found.id] = found, folders[step]
        return [version for step, version in known.items() if step not in now]

    def _read(self, name: str, job: str, step: int, folder: Path) -> CheckpointVersion | None:
        try:
            config = parse_config(read_files(folder, self._base, max_rank=self._max_rank)[CONFIG])
            sha256 = digest(folder)
            created = folder.stat().st_mtime
        except (OSError, AdapterInvalid) as error:
            _log.warning("checkpoint_not_offered", checkpoint=checkpoint_name(name, step), reason=str(error))
            return None
        return CheckpointVersion(
            name=name,
            number=step,
            key=f"{name}@ckpt-step-{step}:{sha256[:12]}",
            created=created,
            rank=max([config.r, *config.rank_pattern.values()]),
            base=self._base.fingerprint,
            sha256=sha256,
            job=job,
            step=step,
        )
