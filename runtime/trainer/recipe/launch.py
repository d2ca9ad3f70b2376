"""Jobs on devices of their own: which recipes ask for them, and what their keys come to.

A recipe without an adapter, or with a key of the group `launched`, runs as processes of its own where the server has
devices set aside (`trainer.devices`). Elsewhere such keys only say how something is computed, and are noted.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Struct

from runtime.trainer.recipe.schema import Recipe, keys_of
from runtime.trainer.recipe.values import FsdpConfig

ParallelMethod = Literal["ddp", "fsdp", "deepspeed"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

PRECISION_KEYS = ("bf16", "fp16")
"""Keys of the group that do not ask for a launched job by themselves."""
INSIDE = (
    "the job runs inside the serving process, over its one copy of the weights: trainer.devices sets no devices aside"
)
_SERVED_TYPE = "the base is trained on in the type in which it is served"

NO_ADAPTER = (
    "is missing, so all weights would be trained, and the served ones are not: that needs devices of its own, and "
    "trainer.devices sets none aside; set `adapter: lora` (or qlora) to train an adapter"
)

FSDP_NOTED: dict[str, str] = {
    name: why
    for why, names in {
        "layers are wrapped one by one, with the rest around them": "auto_wrap_policy min_num_params min_params",
        "checkpoints and results are always whole": "state_dict_type final_state_dict_type",
        "each rank reads the weights itself": "cpu_ram_efficient_loading sync_module_states",
        "FSDP2 has no such choice": (
            "use_orig_params limit_all_gathers version backward_prefetch backward_prefetch_policy forward_prefetch"
        ),
        "bf16 and fp16 say it": "mixed_precision_policy",
    }.items()
    for name in names.split()
}
"""Keys of `fsdp_config` that are accepted with any value, with the reason."""

_WITHOUT_ADAPTER = {
    "unfrozen_parameters": "training some of the weights is not built: all of them are trained without an adapter",
    "freeze_mm_modules": "models of images or sound are not trained",
    "embedding_lr": "all weights have one learning rate",
    "embedding_lr_scale": "all weights have one learning rate",
}
"""Keys that only an adapter makes harmless."""


_IN_THE_SERVER = ("adopt", "came", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd")
"""Families of optimisers for runs in the serving process alone."""
_SERVER_ONLY = {
    "peft_use_dora": "magnitudes are trained",
    "lora_model_dir": "jobs go on from an adapter",
    "lora_modules_to_save": "whole copies are trained",
    "peft_trainable_token_indices": "rows of tokens are trained",
    "tokens": "rows of tokens are trained",
}
"""Keys of an adapter → what is done in the server's own process only."""


class Launch(Struct, frozen=True, kw_only=True):
    """Spread of a recipe over ranks."""

    method: ParallelMethod
    ranks: int
    """Ranks on all nodes together."""
    precision: Precision
    full: bool
    """True if all weights are trained."""


def wants_launch(recipe: Recipe) -> bool:
    """True if the recipe asks for processes of its own."""
    return recipe.adapter is None or any(getattr(recipe, name) for name in _asking())


def _asking() -> tuple[str, ...]:
    return tuple(name for name in keys_of("launched") if name not in PRECISION_KEYS)


def launch_of(recipe: Recipe, devices: int, nodes: int = 1) -> Launch | None:
    """The launched job that a recipe asks for, where `devices` are set aside on each of `nodes`; None for a job inside
    the serving process."""
    if not devices or not wants_launch(recipe):
        return None
    method: ParallelMethod = "deepspeed" if recipe.deepspeed else "ddp"
    if recipe.fsdp or recipe.fsdp_config is not None:
        method = "fsdp"
    precision: Precision = "float32"
    if recipe.fp16 and recipe.fp16 != "auto":
        precision = "float16"
    elif recipe.bf16:
        precision = "auto" if recipe.bf16 == "auto" else "bfloat16"
    return Launch(
        method=method,
        ranks=(recipe.devices or devices) * nodes,
        precision=precision,
        full=recipe.adapter is None,
    )


def fsdp_options(recipe: Recipe) -> FsdpConfig:
    """`fsdp_config` with what the older `fsdp` says."""
    given = recipe.fsdp_config or FsdpConfig()
    older = (recipe.fsdp,) if isinstance(recipe.fsdp, str) else recipe.fsdp
    words = {word for text in older for word in text.replace(",", " ").split()}
    strategy = str(given.sharding_strategy or "").upper()
    keeps = "shard_grad_op" in words or strategy in ("SHARD_GRAD_OP", "2")
    return FsdpConfig(
        offload_params=given.offload_params or "offload" in words,
        reshard_after_forward=given.reshard_after_forward and not keeps,
        activation_checkpointing=given.activation_checkpointing,
        transformer_layer_cls_to_wrap=given.transformer_layer_cls_to_wrap,
    )


# -- problems and notes ----------------------------------------------------------------------------


def launch_problems(recipe: Recipe, values: Mapping[str, Any], devices: int) -> Iterator[tuple[str, str]]:
    """Problems of a recipe in a job on devices of its own; `values` are its keys as they were given."""
    if recipe.deepspeed and (recipe.fsdp or recipe.fsdp_config is not None):
        yield "deepspeed", "and fsdp are two ways to spread a run: give one of them"
    if recipe.bf16 is True and recipe.fp16 is True:
        yield "fp16", "and bf16 are two types to compute in: set one of them"
    launch = launch_of(recipe, devices)
    if launch is None:
        return
    if recipe.devices is not None and recipe.devices > devices:
        yield "devices", f"must be at most {devices}, the devices of trainer.devices, got {recipe.devices}"
    if recipe.neftune_noise_alpha:
        yield "neftune_noise_alpha", "is not built for jobs on devices of their own; leave it out"
    if recipe.optimizer_family in _IN_THE_SERVER:
        yield "optimizer", f"{recipe.optimizer} is not built for jobs on devices of their own; use adamw_torch_fused"
    if recipe.optimizer_family in ("adafactor", "muon") and (launch.full or launch.method != "ddp"):
        yield "optimizer", f"{recipe.optimizer} is for adapters that are whole on each device; use adamw_torch_fused"
    if recipe.num_generated:
        yield (
            "do_causal_lm_eval",
            "is not built for jobs on devices of their own, where no serving engine generates answers; set it to false",
        )
    if launch.method == "deepspeed" and recipe.optimizer_family not in ("adamw", "adamw_8bit"):
        yield "optimizer", f"{recipe.optimizer} is not built with deepspeed; use adamw_torch_fused"
    if not launch.full:
        yield from _for_the_server(recipe)
        return
    if recipe.rl in ("dpo", "ipo", "kto"):
        yield "rl", f"{recipe.rl} compares with the model without its adapter, and there is none: set `adapter: lora`"
    if recipe.loraplus_lr_ratio is not None:
        yield "loraplus_lr_ratio", "is a rate of adapters, and there is none: set `adapter: lora`, or leave it out"
    for name, why in _WITHOUT_ADAPTER.items():
        if values.get(name):
            yield name, f"is not supported without an adapter: {why}"


def _for_the_server(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Problems of an adapter that a job on devices of its own cannot train."""
    instead = "only in the serving process: leave it out, or what asks for devices (devices, deepspeed, fsdp, ddp)"
    for name, what in _SERVER_ONLY.items():
        if getattr(recipe, name):
            yield name, f"{what} {instead}"
    if recipe.first_weights != "uniform":
        yield "peft_init_lora_weights", f"{recipe.first_weights} is made {instead}"


def launch_notes(recipe: Recipe, values: Mapping[str, Any], devices: int) -> Iterator[str]:
    """Notes on the keys of the group `launched`, and on those of adapters in a recipe without one."""
    launch = launch_of(recipe, devices)
    given = [name for name in keys_of("launched") if getattr(recipe, name)]
    if launch is None:
        yield from (f"{name} is ignored: {_SERVED_TYPE if name in PRECISION_KEYS else INSIDE}." for name in given)
        return
    what, ranks = "All weights are" if launch.full else "The adapter is", "ranks" if launch.ranks > 1 else "rank"
    yield f"{what} trained by {launch.method} in {launch.ranks} {ranks} of torchrun's, on trainer.devices."
    if launch.full:
        for name in values:
            if name.startswith(("lora_", "peft_")) and values[name]:
                yield f"{name} is ignored: there is no adapter."
    config = values.get("fsdp_config")
    for name in config if isinstance(config, dict) else ():
        if (why := FSDP_NOTED.get(name.removeprefix("fsdp_"))) is not None:
            yield f"fsdp_config.{name} is ignored: {why}."
