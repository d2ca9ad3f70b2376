"""From gradients to new parameters: one optimiser a layer, so that a step is made of slices too.

Gradients and state are allocated at once and stay in place: long-lived tensors, allocated between the large
temporaries of the first step, would leave holes that nothing fits into.
"""

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from runtime.errors import InvalidRequest
from runtime.trainer.recipe import Recipe
from runtime.trainer.shards import Shards
from runtime.trainer.slices import Slice, Sliced, Slices

Named = tuple[str, Tensor]
"""A parameter by its name, such as `0.qkv.b.q`."""


class LayerOptimizer(ABC):
    """Optimiser of the parameters of one layer."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.state: dict[Tensor, dict[str, Any]] = {}
        """State of each parameter, by torch's own names."""

    @abstractmethod
    def step(self, rate: float) -> None:
        """Change the parameters by their gradients."""

    def capture(self, parameter: Tensor) -> dict[str, Any]:
        """The state of one of the parameters, by names: tensors and numbers."""
        return self.state.get(parameter, {})

    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`, as tensors."""
        self.state[parameter] = dict(state)


# -- value by value --------------------------------------------------------------------------------


class Sgd(LayerOptimizer):
    """Stochastic gradient descent with weight decay and no state."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self._weight_decay = recipe.weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.sub_(parameter.grad.add(parameter, alpha=self._weight_decay), alpha=rate)


class AdamW(LayerOptimizer):
    """torch's fused kernel (arXiv:1711.05101), without the class around it: that imports torch's compiler, which
    takes 74 MB and a second."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self.state = {
            parameter: {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for parameter in parameters
        }
        self._recipe = recipe

    @torch.no_grad()
    def step(self, rate: float) -> None:
        states = [self.state[parameter] for parameter in self.parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            self.parameters,
            [parameter.grad for parameter in self.parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=rate,
            beta1=self._recipe.adam_beta1,
            beta2=self._recipe.adam_beta2,
            weight_decay=self._recipe.weight_decay,
            eps=self._recipe.adam_epsilon,
            amsgrad=False,
            maximize=False,
        )


class Lion(LayerOptimizer):
    """Steps by the sign of a mean of gradients (arXiv:2302.06675), with decoupled weight decay."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self.state = {parameter: {"exp_avg": torch.zeros_like(parameter)} for parameter in parameters}
        self._recipe = recipe

    @torch.no_grad()
    def step(self, rate: float) -> None:
        recipe = self._recipe
        for parameter in self.parameters:
            assert parameter.grad is not None
            mean = self.state[parameter]["exp_avg"]
            direction = mean.lerp(parameter.grad, 1 - recipe.adam_beta1).sign_()
            parameter.mul_(1 - rate * recipe.weight_decay).sub_(direction, alpha=rate)
            mean.lerp_(parameter.grad, 1 - recipe.adam_beta2)


# -- of other libraries ----------------------------------------------------------------------------
#
# Imported only when a recipe asks for them: the extra `optimizers` has them.

PACKAGES = {
    "schedule_free_adamw": "schedulefree",
    "schedule_free_radam": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "adopt": "pytorch_optimizer",
    "came": "pytorch_optimizer",
}
"""Families → the package that has them."""
_COUNTS = ("step", "k", "weight_sum", "lr_max")
"""Numbers that these classes keep once for all parameters of a group."""


def check_optimizer(recipe: Recipe) -> None:
    """Raise `InvalidRequest` where the package of the recipe's optimiser is not installed."""
    package = PACKAGES.get(recipe.optimizer_family)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InvalidRequest(
            f"optimizer {recipe.optimizer} is of the package {package.replace('_', '-')}, which is not installed: pip "
            "install 'eft-server[optimizers]', or use adamw_torch_fused.",
            param="optimizer",
        )


def _counts_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    (group,) = optimizer.param_groups
    return {f"group.{name}": torch.tensor(group[name], dtype=torch.float64) for name in _COUNTS if name in group}


def _restore_counts(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the counts among a parameter's state; the others of its state."""
    (group,) = optimizer.param_groups
    for name in _COUNTS:
        if (value := state.get(f"group.{name}")) is not None:
            group[name] = int(value) if name in ("step", "k") else float(value)
    return {key: value for key, value in state.items() if not key.startswith("group.")}


class Adopt(LayerOptimizer):
    """ADOPT (arXiv:2411.02853) of pytorch-optimizer, with decoupled weight decay, as Axolotl sets it."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        self._optimizer: torch.optim.Optimizer = importlib.import_module("pytorch_optimizer").ADOPT(
            parameters,
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
            weight_decouple=True,
        )
        self.state = self._optimizer.state

    def step(self, rate: float) -> None:
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()

    def capture(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state.get(parameter)
        return {**state, **_counts_of(self._optimizer)} if state else {}

    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        self.state[parameter] = _restore_counts(self._optimizer, state)


class ScheduleFree(LayerOptimizer):
    """Schedule-free AdamW, RAdam and SGD (arXiv:2405.15682) of schedulefree. Gradients are taken at other weights than
    those that are judged and published, which are a mean over the steps."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        super().__init__(parameters)
        library, options = importlib.import_module("schedulefree"), dict[str, Any]()
        kind = {
            "schedule_free_adamw": library.AdamWScheduleFree,
            "schedule_free_radam": library.RAdamScheduleFree,
            "schedule_free_sgd": library.SGDScheduleFree,
        }[recipe.optimizer_family]
        if recipe.optimizer_family != "schedule_free_sgd":
            options = {"betas": (recipe.adam_beta1, recipe.adam_beta2), "eps": recipe.adam_epsilon}
        self._optimizer: Any = kind(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, **options)
        self._optimizer.train()
        self.state = self._optimizer.state
        self._trained: list[Tensor] | None = None
        """The weights that are trained on, while others are in their place."""

    def step(self, rate: float) -> None:
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()

    def capture(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state.get(parameter)
        if not state:
            return {}
        index = next(index for index, own in enumerate(self.parameters) if own is parameter)
        trained = parameter if self._trained is None else self._trained[index]
        return {**state, "trained": trained, **_counts_of(self._optimizer)}

    @torch.no_grad()
    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        own = _restore_counts(self._optimizer, state)
        parameter.copy_(own.pop("trained"))
        self.state[parameter] = own

    def show_result(self) -> None:
        """Put the weights to judge and to publish in place of those that are trained on."""
        self._trained = [parameter.detach().clone() for parameter in self.parameters]
        self._optimizer.eval()

    @torch.no_grad()
    def show_trained(self) -> None:
        """Undo `show_result`, bit by bit."""
        assert self._trained is not None
        self._optimizer.train()
        for parameter, trained in zip(self.parameters, self._trained, strict=True):
            parameter.copy_(trained)  # the way back is not exact
        self._trained = None


ELEMENTWISE: dict[str, Callable[[list[Tensor], Recipe], LayerOptimizer]] = {
    "sgd": Sgd,
    "adamw": AdamW,
    "lion": Lion,
    "adopt": Adopt,
    "schedule_free_adamw": ScheduleFree,
    "schedule_free_radam": ScheduleFree,
    "schedule_free_sgd": ScheduleFree,
}
"""Families that treat each value by itself, so that a part of a parameter is changed as the whole would be."""


class EightBit(LayerOptimizer):
    """AdamW of bitsandbytes, whose state is in 8 bits."""

    def __init__(self, parameters: list[Tensor], recipe: Recipe) -> None:
        import bitsandbytes

        super().__init__(parameters)
        untyped: Any = bitsandbytes.optim
        self._optimizer: torch.optim.Optimizer = untyped.AdamW8bit(
            parameters,
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            eps=recipe.adam_epsilon,
            weight_decay=recipe.weight_decay,
        )
        self.state = self._optimizer.state

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()


# -- whole matrices --------------------------------------------------------------------------------


class Matrices(LayerOptimizer):
    """An optimiser of torch's or another library's that looks at matrices as wholes. Those of A that lie one above the
    other are each a matrix of their own, as in PEFT."""

    def __init__(
        self, parameters: Sequence[tuple[Tensor, int]], recipe: Recipe, make: Callable[..., torch.optim.Optimizer]
    ) -> None:
        """`parameters`: each with the number of its matrices."""
        super().__init__([parameter for parameter, _ in parameters])
        self._pieces = {
            parameter: [_piece(parameter, at, count) for at in range(count)] for parameter, count in parameters
        }
        pieces = [piece for some in self._pieces.values() for piece in some]
        self._optimizer = make(pieces, recipe)

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def capture(self, parameter: Tensor) -> dict[str, Any]:
        found = {
            f"{index}.{key}": value
            for index, piece in enumerate(self._pieces[parameter])
            for key, value in self._optimizer.state.get(piece, {}).items()
        }
        return found | _counts_of(self._optimizer) if found else {}

    def restore(self, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        state = _restore_counts(self._optimizer, state)
        for index, piece in enumerate(self._pieces[parameter]):
            own = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{index}.")}
            # A number of steps is Python's in these classes.
            self._optimizer.state[piece] = {key: int(value) if key == "step" else value for key, value in own.items()}


def _piece(parameter: Tensor, index: int, count: int) -> Tensor:
    """One of `count` matrices that lie one above the other, over the same memory, with its gradient."""
    assert parameter.grad is not None, "gradients are allocated before"
    piece = parameter.detach().chunk(count)[index].requires_grad_()
    piece.grad = parameter.grad.chunk(count)[index]
    return piece


def _adafactor(pieces: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """transformers' (arXiv:1804.04235), as its trainer sets it: the learning rate is the schedule's."""
    from transformers.optimization import Adafactor

    return Adafactor(  # type: ignore[no-untyped-call]
        pieces,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


def _muon(pieces: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """torch's, whose steps are orthogonal matrices."""
    return torch.optim.Muon(pieces, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def _came(pieces: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """pytorch-optimizer's (arXiv:2307.02047), as Axolotl sets it. The epsilon of AdamW's default is not CAME's."""
    epsilon = 1e-30 if recipe.adam_epsilon == 1e-8 else recipe.adam_epsilon
    made: torch.optim.Optimizer = importlib.import_module("pytorch_optimizer").CAME(
        pieces,
        lr=recipe.learning_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2, recipe.adam_beta3),
        eps1=epsilon,
        eps2=recipe.adam_epsilon2,
        weight_decay=recipe.weight_decay,
    )
    return made


MATRICES: dict[str, Callable[[list[Tensor], Recipe], torch.optim.Optimizer]] = {
    "adafactor": _adafactor,
    "muon": _muon,
    "came": _came,
}


# -- the whole model -------------------------------------------------------------------------------


class Optimizer:
    """All parameters of one adapter, in groups by layer."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], recipe: Recipe, shards: Shards) -> None:
        """`parameters` are named `layer.…` and lie layer by layer; `shards` describes the parts held here."""
        self._recipe = recipe
        self._shards = shards
        self._named = list(parameters)
        self.zero_grad()
        self._optimizers: list[LayerOptimizer] = []
        self._scales: list[float] = []
        """Of the learning rate, for each of them."""
        self._shows_result = False
        for _, layer in groupby(self._named, key=lambda item: item[0].partition(".")[0]):
            for scale, group in _by_scale(list(layer), recipe):
                self._optimizers.append(_make(recipe, group, shards, self._matrices))
                self._scales.append(scale)

    def step(self, factor: float) -> Sliced[float]:
        """Clip, change the parameters at `factor` times the learning rate, and clear the gradients.

        Returns the norm of all gradients before clipping; where it is not finite, nothing was changed.
        """
        yield Slice("clip", 1)
        self._shards.complete(self._grads)
        norm = self._norm()
        if norm == norm and norm != float("inf"):
            self._clip(norm)
            yield from self._change(self._recipe.learning_rate * factor)
        self.zero_grad()
        return norm

    @contextmanager
    def result_shown(self, changed: Callable[[], None]) -> Iterator[None]:
        """Context in which the parameters are those to judge and to publish, where an optimiser trains on others;
        `changed` is called when they were exchanged. May be entered within itself."""
        exchanged = [one for one in self._optimizers if isinstance(one, ScheduleFree)]
        if self._shows_result or not exchanged:
            yield
            return
        self._shows_result = True
        for one in exchanged:
            one.show_result()
        changed()
        try:
            yield
        finally:
            for one in exchanged:
                one.show_trained()
            self._shows_result = False
            changed()

    def _matrices(self, name: str) -> int:
        """Number of matrices that lie one above the other in a parameter: those of A are one for each B."""
        above = name.removesuffix(".a")
        return 1 if above == name else max(1, sum(other.startswith(f"{above}.b.") for other, _ in self._named))

    def zero_grad(self) -> None:
        for _, parameter in self._named:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.zero_()

    @property
    def _grads(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self._named if parameter.grad is not None}

    def _norm(self) -> float:
        grads = self._grads
        return self._shards.squares(grads) ** 0.5 if grads else 0.0

    def _clip(self, norm: float) -> None:
        most = self._recipe.max_grad_norm
        if most == 0 or norm <= most:
            return
        for _, parameter in self._named:
            if parameter.grad is not None:
                parameter.grad.mul_(most / (norm + 1e-6))

    def _change(self, rate: float) -> Slices:
        done = 0
        while done < len(self._optimizers):
            count = yield Slice("optimizer", len(self._optimizers) - done)
            part = slice(done, done + count)
            for scale, optimizer in zip(self._scales[part], self._optimizers[part], strict=True):
                optimizer.step(rate * scale)
            done += count

    def capture(self) -> dict[str, Tensor]:
        """A copy of the whole state, on the CPU: `name.key` for every parameter, such as `0.qkv.a.exp_avg`. All ranks
        at once."""
        return self._shards.gather_state(
            {
                (name, key): torch.as_tensor(value).detach()
                for name, parameter in self._named
                for key, value in self._state(parameter).items()
            }
        )

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take an earlier `capture`."""
        by_id = {id(parameter): name for name, parameter in self._named}
        for optimizer in self._optimizers:
            for parameter in optimizer.parameters:
                name = by_id[id(parameter)]
                state = {
                    key.removeprefix(f"{name}."): self._shards.pick(name, value).clone()
                    for key, value in tensors.items()
                    if key.startswith(f"{name}.")
                }
                if state:
                    optimizer.restore(parameter, state)

    def release(self) -> None:
        """Release gradients and state: there will be no more steps."""
        for _, parameter in self._named:
            parameter.grad = None
        self._optimizers.clear()

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        for optimizer in self._optimizers:
            if any(parameter is own for own in optimizer.parameters):
                return {key: value for key, value in optimizer.capture(parameter).items() if value is not None}
        return {}


def eight_bit_available(device: torch.device) -> bool:
    """True if bitsandbytes' optimisers with 8-bit states run here: they are CUDA kernels."""
    return device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None


def _is_rows(name: str) -> bool:
    """True for the rows of embedding and head (`TrainableVocabulary.parameters`)."""
    return name.endswith(".rows")


def _by_scale(layer: list[Named], recipe: Recipe) -> list[tuple[float, list[Named]]]:
    """A layer's parameters by the scale of their learning rate: that of LoRA+ (arXiv:2402.12354) for B matrices and
    vectors, as PEFT groups them, and that of embeddings for their rows."""
    ratio = recipe.loraplus_lr_ratio
    if _is_rows(layer[0][0]):
        own = recipe.embedding_lr
        return [(recipe.embedding_lr_scale or 1.0 if own is None else own / recipe.learning_rate, layer)]
    if ratio is None:
        return [(1.0, layer)]
    raised = [item for item in layer if ".b." in item[0] or item[1].ndim == 1]
    plain = [item for item in layer if not any(item[1] is other for _, other in raised)]
    return [(scale, some) for scale, some in ((1.0, plain), (ratio, raised)) if some]


def _make(recipe: Recipe, named: list[Named], shards: Shards, matrices: Callable[[str], int]) -> LayerOptimizer:
    family, parameters = recipe.optimizer_family, [parameter for _, parameter in named]
    if family == "adamw_8bit":
        if eight_bit_available(parameters[0].device):
            return EightBit(parameters, recipe)
        family = "adamw"
    if family == "muon" and _is_rows(named[0][0]):  # Muon's authors leave embedding and head to AdamW
        family = "adamw"
    if family in ELEMENTWISE:
        return ELEMENTWISE[family](parameters, recipe)
    if not shards.alone:
        raise ValueError(f"optimizer {recipe.optimizer} works on whole matrices, of which each rank holds a part")
    return Matrices([(parameter, matrices(name)) for name, parameter in named], recipe, MATRICES[family])
