"""From settings to a working engine: opens the checkpoint, sizes the cache, puts the parts together."""

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from msgspec import ValidationError, convert

import kernels
from runtime.blocks import BlockManager, SwapSpace
from runtime.engine import Engine
from runtime.hooks import Hooks
from runtime.logs import get_logger
from runtime.metrics import Metrics
from runtime.scheduler import Scheduler, Speculation
from runtime.scheduler.policies import make_policy
from runtime.tenants import tenant_weights
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.decoder import Decoder
from runtime.workers.executor import InProcessExecutor
from runtime.workers.kv_cache import KVCache, block_bytes
from runtime.workers.layers import WeightError
from runtime.workers.loading import Checkpoint, open_checkpoint
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.lora_base import LoraBase
from runtime.workers.memory import keep_freed_memory, return_freed_memory
from runtime.workers.model import Model
from runtime.workers.models import find_model, is_native
from runtime.workers.spec import DecoderSpec
from runtime.workers.worker import Worker
from settings.schema import CacheSettings, ModelSettings, SchedulerSettings, Settings

DEFAULT_CONTEXTS = 4
"""Without a setting the cache holds so many full contexts, if a quarter of the free memory does."""


_log = get_logger(__name__)


@dataclass(frozen=True)
class Assembled:
    """An engine, and what the outside wants to know of its model."""

    engine: Engine
    model_name: str
    block_size: int
    num_blocks: int
    decoder: Model
    lora_base: LoraBase
    """What adapters must fit."""


def assemble(settings: Settings) -> Assembled:
    """Load the model and build the engine. Raises `ModelLoadError` with what is wrong and what would work."""
    return_freed_memory()
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    checkpoint = open_checkpoint(
        settings.model.model, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    name = settings.model.served_model_name or checkpoint.name
    decoder = load_model(checkpoint, settings.model)
    keep_freed_memory()
    context = settings.model.max_model_len or decoder.spec.max_position
    num_blocks = _num_blocks(settings.cache, decoder, context)
    block_size = settings.cache.block_size
    max_len = min(context, num_blocks * block_size)
    spec = decoder.spec
    cache = make_cache(decoder, num_blocks, block_size, decoder.device)
    num_host_blocks = _num_host_blocks(settings, decoder)
    host = make_cache(decoder, num_host_blocks, block_size, torch.device("cpu")) if num_host_blocks else None
    scheduler = make_scheduler(settings.scheduler, settings.cache, num_blocks, spec.window, num_host_blocks)
    lora_base = base_of(decoder, checkpoint, name)
    slots = AdapterSlots(
        lora_base,
        decoder.ops,
        max_rank=settings.adapters.max_lora_rank,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    worker = Worker(
        decoder, cache, max_running=settings.scheduler.max_running, max_len=max_len, host=host, adapters=slots
    )
    metrics = Metrics(
        name,
        vllm_names=settings.observability.vllm_names,
        max_model_len=max_len,
        block_size=block_size,
        num_blocks=num_blocks,
        max_adapters=settings.adapters.max_loaded,
    )
    engine = Engine(
        scheduler,
        InProcessExecutor(worker),
        checkpoint.tokenizer,
        metrics,
        max_len=max_len,
        asynchronous=_asynchronous(settings.scheduler.asynchronous, decoder.device),
        hooks=Hooks.installed(),
    )
    return Assembled(engine, name, block_size, num_blocks, decoder, lora_base)


def make_cache(decoder: Model, num_blocks: int, block_size: int, device: torch.device) -> KVCache:
    """A KV cache for the decoder, on its device or in the memory beside it."""
    return KVCache(
        decoder.spec.kv_shapes,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=decoder.dtype,
        device=device,
        pinned=device.type == "cpu" and decoder.device.type == "cuda",
    )


def make_scheduler(
    settings: SchedulerSettings,
    cache: CacheSettings,
    num_blocks: int,
    window: int | None = None,
    num_host_blocks: int = 0,
) -> Scheduler:
    """The scheduler and its block pool. `window`: how many tokens back the model looks at most; `num_host_blocks`:
    those in host memory that preempted sequences are kept in."""
    speculation = None
    if settings.speculative_tokens is not None:
        speculation = Speculation(
            settings.speculative_tokens, settings.speculative_max_running, settings.speculative_min_acceptance
        )
    return Scheduler(
        BlockManager(num_blocks, cache.block_size, prefix_caching=cache.prefix_caching),
        make_policy(settings.policy, weights=tenant_weights(settings.fair_weights)),
        max_batched_tokens=settings.max_batched_tokens,
        max_prefill_chunk=settings.max_prefill_chunk,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_waiting_tokens=settings.max_waiting_tokens,
        max_preemptions=settings.max_preemptions,
        speculation=speculation,
        sliding_window=window,
        swap=SwapSpace(num_host_blocks) if num_host_blocks else None,
    )


def load_model(checkpoint: Checkpoint, settings: ModelSettings) -> Model:
    """The checkpoint's weights in our decoder, or in transformers' modules where there is no family for them; on the
    device and in the type that the settings ask for. Raises `ModelLoadError`."""
    return load_decoder(checkpoint, settings) if is_native(checkpoint.config) else _load_fallback(checkpoint, settings)


def base_of(model: Model, checkpoint: Checkpoint, name: str) -> LoraBase:
    """What adapters for `model`, made from `checkpoint`, must fit."""
    if isinstance(model, Decoder):
        return LoraBase.of(model, find_model(checkpoint.config), name)
    from runtime.workers.fallback import FallbackDecoder, lora_base

    assert isinstance(model, FallbackDecoder)
    return lora_base(model, name)


def _load_fallback(checkpoint: Checkpoint, settings: ModelSettings) -> Model:
    from runtime.workers.fallback import load_fallback  # imports transformers

    device = _device(settings.device)
    try:
        model = load_fallback(
            checkpoint.source,
            checkpoint.config,
            kernels.load(settings.kernels),
            max_len=settings.max_model_len,
            dtype=_dtype(settings.dtype, device),
            device=device,
            quantization=settings.quantization,
        )
    except (WeightError, ValueError) as error:
        raise ModelLoadError(f"{checkpoint.name}: {error}") from error
    _check_context(settings, model.spec, checkpoint)
    architecture = ", ".join(checkpoint.config.get("architectures", []))
    _log.warning(
        "no_native_model",
        architecture=architecture,
        served_through="transformers",
        lora_targets=len(model.targets),
    )
    return model


def load_decoder(checkpoint: Checkpoint, settings: ModelSettings) -> Decoder:
    """The checkpoint's weights in our decoder, on the device and in the type that the settings ask for."""
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    try:
        model = find_model(checkpoint.config)
        spec = _checked(model.spec(checkpoint.config))
        context = _check_context(settings, spec, checkpoint)
        quantization: str = settings.quantization
        if quantization != "none" and spec.experts is not None:
            raise ModelLoadError(
                f"quantization {quantization!r} is not supported for mixtures of experts; supported is: none."
            )
        if dtype is torch.bfloat16 and device.type == "cpu" and spec.experts is None:
            # Processors without bfloat16 arithmetic would be slower with it: there it is how weights are stored.
            dtype, quantization = torch.float32, "bfloat16" if quantization == "none" else quantization
        decoder = Decoder(spec, kernels.load(settings.kernels), max_len=context, dtype=dtype, device=device)
        stored = _blocks(checkpoint, device) if quantization == "gguf" else checkpoint.tensors()
        decoder.load(model.weights(stored, spec), quantization=quantization)
    except (WeightError, ValueError) as error:
        raise ModelLoadError(f"{checkpoint.name}: {error}") from error
    except KeyError as error:
        raise ModelLoadError(f"{checkpoint.name}: config.json has no {error.args[0]!r}") from error
    return decoder


def _check_context(settings: ModelSettings, spec: DecoderSpec, checkpoint: Checkpoint) -> int:
    """The longest sequence to serve. Raises `ModelLoadError`."""
    context = settings.max_model_len or spec.max_position
    if context > spec.max_context:
        raise ModelLoadError(
            f"max_model_len is {context}, but {checkpoint.name} was made for at most {spec.max_context} tokens."
        )
    return context


def _blocks(checkpoint: Checkpoint, device: torch.device) -> Iterator[tuple[str, kernels.Weight]]:
    if device.type != "cpu":
        raise ModelLoadError(f"quantization gguf works on the CPU, and model.device is {device.type!r}.")
    return checkpoint.blocks()


def _checked(spec: DecoderSpec) -> DecoderSpec:
    """Raise `ValueError` when a value from config.json is not of the type that the spec says."""
    try:
        return convert(spec, DecoderSpec, from_attributes=True)
    except ValidationError as error:
        raise ValueError(f"config.json: {error}") from None


def _asynchronous(mode: str, device: torch.device) -> bool:
    """On a CPU planning and computing share the cores, and there is nothing to be gained."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelLoadError(f"model.device must be auto, cpu, cuda or cuda:N, got {name!r}.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(f"model.device is {name!r}, but torch finds no CUDA device here.")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _bytes_of_block(settings: CacheSettings, decoder: Model) -> int:
    return block_bytes(decoder.spec.kv_shapes, block_size=settings.block_size, dtype=decoder.dtype)


def _num_host_blocks(settings: Settings, decoder: Model) -> int:
    """0 where what is preempted is computed again."""
    if settings.scheduler.preemption_mode == "recompute":
        return 0
    size, memory = _bytes_of_block(settings.cache, decoder), settings.cache.swap_memory
    if memory < size:
        raise ModelLoadError(f"cache.swap_memory is {memory} bytes, but one block takes {size}.")
    return memory // size


def _num_blocks(settings: CacheSettings, decoder: Model, context: int) -> int:
    if settings.num_blocks is not None:
        return settings.num_blocks
    size = _bytes_of_block(settings, decoder)
    if settings.kv_memory is not None:
        count = settings.kv_memory // size
        if count == 0:
            raise ModelLoadError(f"cache.kv_memory is {settings.kv_memory} bytes, but one block takes {size}.")
        return count
    free = int(psutil.virtual_memory().available)
    if decoder.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(decoder.device)
    return max(1, min(DEFAULT_CONTEXTS * -(-context // settings.block_size), free // 4 // size))
