"""From a recipe's bytes to a job that can run on the served model: `jobs.ports.Preparer`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.trainer.adapters.names import check_name
from runtime.trainer.data.files import DataFiles
from runtime.trainer.plan import Plan, prepare
from runtime.trainer.recipe import adapter_name, load_recipe
from runtime.trainer.shape import shape_of_base
from runtime.trainer.summary import summarize
from settings.schema import Settings

if TYPE_CHECKING:
    from runtime.service import EngineService


@dataclass(frozen=True)
class PlannedJob:
    """`jobs.ports.PreparedJob`."""

    name: str
    """Empty: the job's id."""
    plan: Plan
    summary: dict[str, Any]

    @property
    def total_steps(self) -> int:
        return self.plan.schedule.total_steps

    def publish_when(self, metrics: dict[str, float]) -> tuple[bool, str]:
        publish = self.plan.recipe.publish
        allowed = publish.allows(metrics)
        if publish.metric is None:
            return allowed, f"publish.when is {publish.when}"
        value = metrics.get(publish.metric)
        given = "not known" if value is None else f"{value:.6g}"
        return allowed, f"publish.when is {publish.when!r}, and {publish.metric} is {given}"


class RecipePreparer:
    """Reads recipes for one served model."""

    def __init__(
        self,
        service: "EngineService",
        settings: Settings,
        directory: Path,
        *,
        tokens_per_second: Callable[[], float | None],
    ) -> None:
        """`directory` is the state directory, whose `data` folder recipes may read as they may the data roots."""
        self._service = service
        self._settings = settings
        self._roots = [Path(root).expanduser() for root in settings.trainer.data_roots] + [directory / "data"]
        self._tokens_per_second = tokens_per_second
        decoder, base = service.decoder, service.lora_base
        self._shape = shape_of_base(decoder.spec, base, bytes_per_value=decoder.dtype.itemsize)

    def prepare(self, recipe_yaml: bytes, uploads: dict[str, Path]) -> PlannedJob:
        """See `jobs.ports.Preparer`."""
        service = self._service
        names = (service.model_name, self._settings.model.model)
        recipe = load_recipe(recipe_yaml, max_lora_rank=self._settings.adapters.max_lora_rank, served=names)
        name = adapter_name(recipe, "")
        if name:
            check_name(name, base=service.model_name, param="name")
        plan = prepare(
            recipe,
            service.tokenizer,
            DataFiles(uploads, self._roots),
            model_names=names,
            max_len=service.decoder.max_len,
            shape=self._shape,
            tokens_per_second=self._tokens_per_second(),
        )
        summary: dict[str, Any] = msgspec.to_builtins(summarize(plan))
        summary["total_steps"] = plan.schedule.total_steps
        if recipe.save_total_limit is not None:
            summary["save_total_limit"] = recipe.save_total_limit
        return PlannedJob(name, plan, summary)
