"""A model spread over ranks: DDP, FSDP2 and DeepSpeed behind one interface.

DDP and FSDP2 change parameters with the optimisers of the embedded trainer, so that a recipe means the same in both.
All methods are called on all ranks at once.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtime.trainer.launched.ranks import Ranks
from runtime.trainer.launched.scoring import ScoredModel
from runtime.trainer.optimizer import ELEMENTWISE, MATRICES, EightBit, LayerOptimizer, Matrices, eight_bit_available
from runtime.trainer.recipe import Recipe
from runtime.trainer.recipe.launch import fsdp_options

Trained = dict[str, nn.Parameter]
"""Parameters that are trained, by their names in the model."""


class LossScale:
    """Factor of the loss in float16: halved when gradients overflow, doubled after a while without."""

    FIRST, LEAST, GROWTH_STEPS = 2.0**16, 2.0**-10, 2000

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = self.FIRST if enabled else 1.0
        self._good = 0

    def settle(self, *, finite: bool) -> None:
        """Take note of a step's gradients."""
        if not self.enabled:
            return
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value = max(self.LEAST, self.value / 2)
        elif self._good % self.GROWTH_STEPS == 0:
            self.value *= 2

    @property
    def exhausted(self) -> bool:
        """True where no smaller factor is left."""
        return self.enabled and self.value <= self.LEAST


class SpreadModel(ABC):
    """The model of this rank, with gradients and optimiser."""

    def __init__(self, scored: ScoredModel, trained: Trained, ranks: Ranks, scale: LossScale) -> None:
        self.scored = scored
        self.module: nn.Module = scored
        """The model as training calls it."""
        self.plain: nn.Module = scored
        """The model as evaluations call it."""
        self._trained = trained
        self._ranks = ranks
        self.scale = scale

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a share of a step's loss; the step's is the sum over ranks and micro-batches. `last`: it
        is the rank's last micro-batch of the step."""

    def training(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward pass."""
        return contextlib.nullcontext()

    @abstractmethod
    def step(self, rate: float) -> float:
        """Clip and change the parameters, and clear the gradients. Returns the norm of all gradients before clipping;
        where it is not finite, nothing was changed."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """A copy of every whole parameter on the CPU of rank 0; on other ranks nothing."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The same of the optimiser's state, by `name:key`."""

    @abstractmethod
    def restore(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take earlier results of `parameters` and `state`."""


class _OwnOptimizer(SpreadModel):
    """Changes parameters with the embedded trainer's optimisers: on ranks, each its part of the values."""

    def __init__(
        self,
        scored: ScoredModel,
        trained: Trained,
        ranks: Ranks,
        scale: LossScale,
        recipe: Recipe,
        parts: dict[str, Tensor],
    ) -> None:
        """`parts`: what this rank holds of each parameter, over the same memory."""
        super().__init__(scored, trained, ranks, scale)
        self._recipe = recipe
        self._parts = parts
        for part in parts.values():
            part.grad = torch.zeros_like(part)
        self._optimizers = [(factor, _make(recipe, some)) for factor, some in _by_scale(parts, recipe)]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Both ways take the mean over ranks.
        (loss * (self._ranks.size * self.scale.value)).backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, rate: float) -> float:
        self._collect()
        grads = [part.grad for part in self._parts.values() if part.grad is not None]
        norm = self._norm(grads) / self.scale.value
        finite = norm == norm and norm != float("inf")
        if finite:
            most = self._recipe.max_grad_norm
            factor = most / (norm + 1e-6) if 0 < most < norm else 1.0
            if (factor := factor / self.scale.value) != 1.0:
                for grad in grads:
                    grad.mul_(factor)
            for relative, optimizer in self._optimizers:
                optimizer.step(rate * relative)
        self.scale.settle(finite=finite)
        self._clear()
        return norm

    @abstractmethod
    def _collect(self) -> None:
        """Bring the gradients of the step to the parts."""

    @abstractmethod
    def _clear(self) -> None:
        """Clear the gradients."""

    @abstractmethod
    def _norm(self, grads: list[Tensor]) -> float:
        """The norm of the whole gradients."""

    @abstractmethod
    def _whole(self, name: str, part: Tensor) -> Tensor | None:
        """The whole tensor, of what each rank holds of it, on the CPU of rank 0."""

    @abstractmethod
    def _part(self, name: str, whole: Tensor) -> Tensor:
        """The part of a whole tensor, of the parameter's shape, that this rank holds."""

    def parameters(self) -> dict[str, Tensor]:
        found = {name: self._whole(name, part.detach()) for name, part in self._parts.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, part in self._parts.items():
            for key, value in self._optimizer_of(part).capture(part).items():
                if value is None:
                    continue
                tensor = torch.as_tensor(value).detach()
                whole = self._whole(name, tensor) if tensor.shape == part.shape else tensor.cpu().clone()
                if whole is not None and self._ranks.first:
                    found[f"{name}:{key}"] = whole
        return found

    @torch.no_grad()
    def restore(self, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        if self._parts.keys() != parameters.keys():
            raise ValueError("these are the weights of another model")
        for name, part in self._parts.items():
            whole = self._trained[name].shape
            part.copy_(self._part(name, parameters[name]))
            own = {key.rpartition(":")[2]: value for key, value in state.items() if key.startswith(f"{name}:")}
            picked = {
                key: self._part(name, value).to(part.device).clone() if value.shape == whole else value.to(part.device)
                for key, value in own.items()
            }
            if picked:
                self._optimizer_of(part).restore(part, picked)

    def _optimizer_of(self, part: Tensor) -> LayerOptimizer:
        return next(one for _, one in self._optimizers if any(part is other for other in one.parameters))


def _by_scale(parts: Mapping[str, Tensor], recipe: Recipe) -> list[tuple[float, list[Tensor]]]:
    """Parameters by the factor of their learning rate: with LoRA+, B matrices have another one."""
    ratio = recipe.loraplus_lr_ratio
    if ratio is None:
        return [(1.0, list(parts.values()))]
    raised = [part for name, part in parts.items() if ".lora_B." in name]
    plain = [part for name, part in parts.items() if ".lora_B." not in name]
    return [(factor, some) for factor, some in ((1.0, plain), (ratio, raised)) if some]


def _make(recipe: Recipe, parts: list[Tensor]) -> LayerOptimizer:
    family = recipe.optimizer_family
    if family == "adamw_8bit":
        if eight_bit_available(parts[0].device):
            return EightBit(parts, recipe)
        family = "adamw"
    if family in ELEMENTWISE:
        return ELEMENTWISE[family](parts, recipe)
    return Matrices([(part, 1) for part in parts], recipe, MATRICES[family])


# -- ddp -------------------------------------------------------------------------------------------


class DdpModel(_OwnOptimizer):
    """A copy on each rank (`torch.nn.parallel.DistributedDataParallel`)."""

    def __init__(self, scored: ScoredModel, trained: Trained, ranks: Ranks, scale: LossScale, recipe: Recipe) -> None:
        scored.to(ranks.device)
        super().__init__(scored, trained, ranks, scale, recipe, {name: one.detach() for name, one in trained.items()})
        for name, parameter in trained.items():
            parameter.grad = self._parts[name].grad
        self._ddp = torch.nn.parallel.DistributedDataParallel(
            scored,
            device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
            find_unused_parameters=recipe.ddp_find_unused_parameters,
            broadcast_buffers=recipe.ddp_broadcast_buffers,
            bucket_cap_mb=recipe.ddp_bucket_cap_mb,
        )
        self.module = self._ddp

    def training(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._ddp.no_sync()

    def _collect(self) -> None:
        for name, parameter in self._trained.items():
            grad, own = parameter.grad, self._parts[name].grad
            if grad is not None and grad is not own and own is not None:
                own.copy_(grad)

    def _clear(self) -> None:
        for name, parameter in self._trained.items():
            own = self._parts[name].grad
            if own is not None:
                own.zero_()
            parameter.grad = own

    def _norm(self, grads: list[Tensor]) -> float:
        return float(torch.nn.utils.get_total_norm(grads))

    def _whole(self, name: str, part: Tensor) -> Tensor | None:
        return part.cpu().clone() if self._ranks.first else None

    def _part(self, name: str, whole: Tensor) -> Tensor:
        return whole


# -- fsdp ------------------------------------------------------------------------------------------


class FsdpModel(_OwnOptimizer):
    """A part of each parameter on each rank (FSDP2, `torch.distributed.fsdp.fully_shard`)."""

    def __init__(
        self, scored: ScoredModel, ranks: Ranks, scale: LossScale, recipe: Recipe, compute: torch.dtype | None
    ) -> None:
        """`compute`: type to compute in, where that is not the weights'."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        options = fsdp_options(recipe)
        shared: dict[str, Any] = {
            "mesh": init_device_mesh(ranks.device.type, (ranks.size,)),
            "reshard_after_forward": options.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute, reduce_dtype=None if compute is None else torch.float32, output_dtype=None
            ),
            "offload_policy": CPUOffloadPolicy()
            if options.offload_params and ranks.device.type != "cpu"
            else OffloadPolicy(),
        }
        for layer in _layers(scored.model, options.transformer_layer_cls_to_wrap):
            fully_shard(layer, **shared)
        fully_shard(scored, **shared)
        trained = trained_of(scored.model)
        super().__init__(scored, trained, ranks, scale, recipe, {name: _local(one) for name, one in trained.items()})

    def _collect(self) -> None:
        for name, parameter in self._trained.items():
            own = self._parts[name].grad
            assert own is not None, "gradients are allocated in the beginning"
            if parameter.grad is not None:
                own.copy_(_local(parameter.grad))

    def _clear(self) -> None:
        for parameter in self._trained.values():
            parameter.grad = None
        for part in self._parts.values():
            assert part.grad is not None
            part.grad.zero_()

    def _norm(self, grads: list[Tensor]) -> float:
        squares = sum(float(grad.double().square().sum()) for grad in grads)
        return float(self._ranks.add_up([squares])[0] ** 0.5)

    def _whole(self, name: str, part: Tensor) -> Tensor | None:
        from torch.distributed.tensor import DTensor

        like: Any = self._trained[name]
        device = self._ranks.device
        spread = DTensor.from_local(
            part.to(device), like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        whole = spread.full_tensor()
        return whole.cpu() if self._ranks.first else None

    def _part(self, name: str, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        like: Any = self._trained[name]
        return _local(distribute_tensor(whole.to(self._ranks.device), like.device_mesh, like.placements))


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found.detach()


def _layers(model: nn.Module, named: str | None) -> list[nn.Module]:
    """The modules that are sharded by themselves: those of the named classes, or of transformers' own for the model."""
    outer: Any = model
    inner = outer.get_base_model() if hasattr(model, "get_base_model") else outer
    classes = {name.strip() for name in named.split(",")} if named else set(inner._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in classes]


def trained_of(model: nn.Module) -> Trained:
    """The parameters that are trained. Tied ones come once."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}
