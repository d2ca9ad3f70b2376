"""A model spread by DeepSpeed's ZeRO, and the configuration that it gets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.trainer.launched.ranks import Ranks
from runtime.trainer.launched.scoring import ScoredModel
from runtime.trainer.launched.spread import LossScale, SpreadModel, trained_of
from runtime.trainer.recipe import Recipe

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroModel(SpreadModel):
    """ZeRO of the stage that the configuration names. The optimiser is torch's AdamW, on parts of the parameters."""

    def __init__(
        self, scored: ScoredModel, ranks: Ranks, recipe: Recipe, given: Mapping[str, Any], compute: str
    ) -> None:
        """`given`: the recipe's configuration; `compute`: float32, bfloat16 or float16."""
        import deepspeed

        trained = trained_of(scored.model)
        super().__init__(scored, trained, ranks, LossScale(enabled=False))
        optimizer = torch.optim.AdamW(
            _groups(trained, recipe),
            lr=0.0,  # DeepSpeed takes a step while it starts
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
        )
        config = complete(given, recipe, ranks=ranks.size, compute=compute)
        self._deepspeed: Any = deepspeed.initialize(model=scored, optimizer=optimizer, config=config)[0]
        self.module = self.plain = self._deepspeed
        self._make_states()
        self._set_steps(0)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss * self._ranks.size, scale_wrt_gas=False)

    def step(self, rate: float) -> float:
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = rate * group.get("relative_rate", 1.0)
        self._deepspeed.step()
        norm = self._deepspeed.get_global_grad_norm()
        return 0.0 if norm is None or getattr(self._deepspeed.optimizer, "overflow", False) else float(norm)

    def parameters(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return self._gathered({name: safe_get_full_fp32_param(one) for name, one in self._trained.items()})

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {
            f"{name}:{key}": safe_get_full_optimizer_state(one, key)
            for name, one in self._trained.items()
            for key in _MOMENTS
        }
        return self._gathered({**moments, "steps": torch.tensor(float(self._deepspeed.global_steps))})

    def restore(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self._trained.keys() != parameters.keys():
            raise ValueError("these are the weights of another model")
        with deepspeed.zero.GatheredParameters(list(self._trained.values()), modifier_rank=0), torch.no_grad():
            for name, one in self._trained.items():
                one.copy_(parameters[name])
        for name, one in self._trained.items():
            safe_set_full_fp32_param(one, parameters[name].to(self._ranks.device))
            for key in _MOMENTS:
                safe_set_full_optimizer_state(one, state[f"{name}:{key}"].to(self._ranks.device), key)
        steps = int(state["steps"])
        self._deepspeed.global_steps = steps
        self._set_steps(steps)

    def _make_states(self) -> None:
        """Have the optimiser's state before the first step, which else makes it: it may be restored, or captured."""
        own: Any = self._deepspeed.optimizer
        inner = own.optimizer
        parts = getattr(own, "fp32_partitioned_groups_flat", None)  # of stage 3, which keeps the groups empty
        for part in parts or (part for group in inner.param_groups for part in group["params"]):
            if "exp_avg" not in inner.state.get(part, {}):
                moments = {key: torch.zeros_like(part) for key in _MOMENTS}
                inner.state[part] = {"step": torch.zeros(()), **moments}
        if (link := getattr(own, "_lazy_init_hp_params_optimizer_state", None)) is not None:
            link()

    def _set_steps(self, steps: int) -> None:
        """Have the bias corrections of AdamW begin at a number of steps."""
        own: Any = self._deepspeed.optimizer
        for state in own.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.full_like(torch.as_tensor(state["step"], dtype=torch.float32), float(steps))

    def _gathered(self, found: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        if not self._ranks.first:
            return {}
        return {name: one.detach().float().cpu().clone() for name, one in found.items() if one is not None}


def _groups(trained: Mapping[str, torch.nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    ratio = recipe.loraplus_lr_ratio
    if ratio is None:
        return [{"params": list(trained.values())}]
    raised = [one for name, one in trained.items() if ".lora_B." in name]
    plain = [one for name, one in trained.items() if ".lora_B." not in name]
    return [{"params": plain}, {"params": raised, "relative_rate": ratio}]


def complete(given: Mapping[str, Any], recipe: Recipe, *, ranks: int, compute: str) -> dict[str, Any]:
    """The configuration for DeepSpeed: what the recipe says stands above what the file says, and `auto` is filled in or
    left to DeepSpeed."""
    config = _without_auto(dict(given))
    for name in ("optimizer", "scheduler", "train_batch_size", "zero_allow_untested_optimizer"):
        config.pop(name, None)
    return {
        **config,
        "train_micro_batch_size_per_gpu": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.gradient_accumulation_steps,
        "train_batch_size": recipe.micro_batch_size * recipe.gradient_accumulation_steps * ranks,
        "gradient_clipping": recipe.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {**_mapping(config.get("bf16")), "enabled": compute == "bfloat16"},
        "fp16": {**_mapping(config.get("fp16")), "enabled": compute == "float16"},
        "steps_per_print": 2**31,
    }


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_auto(item) for name, item in value.items() if item != "auto"}
    return value
