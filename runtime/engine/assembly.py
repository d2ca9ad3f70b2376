"""Assembly of an engine from settings: loads the model, sizes the cache, connects the parts."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.blocks import BlockManager, SwapSpace
from runtime.checkpoints import Checkpoint, open_checkpoint
from runtime.checkpoints.generation_config import sampling_defaults
from runtime.checkpoints.model_loading import base_of, describe_decoder, load_model, tokenizer_of, value_bytes
from runtime.engine.devices import training_devices
from runtime.engine.engine import Engine
from runtime.engine.hooks import Hooks
from runtime.messages import SamplingDefaults
from runtime.metrics import CacheShape, Metrics
from runtime.model.attention import CACHE_DTYPES, block_bytes
from runtime.model.config import ModelLoadError
from runtime.model.families import find_model
from runtime.model.group import SOLO, UnconnectedRank
from runtime.model.lora_base import LoraBase
from runtime.model.model import DeviceMemory, Model, device_memory, make_cache, make_device
from runtime.scheduler import Scheduler, Speculation
from runtime.scheduler.policies import BackgroundLast, make_policy
from runtime.support.logs import get_logger
from runtime.support.memory import keep_freed_memory, return_freed_memory
from runtime.text.grammar import GrammarCompiler
from runtime.trainer.run import make_run_on
from runtime.trainer.sliced_run import MakeRun
from runtime.workers.adapter_slots import AdapterSlots, lora_dtype
from runtime.workers.executor import Executor, InProcessExecutor
from runtime.workers.worker import Worker
from settings.schema import AdapterSettings, CacheSettings, ParallelSettings, SchedulerSettings, Settings

log = get_logger(__name__)

DEFAULT_CONTEXTS = 4
"""Full contexts that a cache in host memory holds without a setting, if they fit in a quarter of what is free."""


@dataclass(frozen=True)
class Assembled:
    """An engine, and the facts about its model that other components need."""

    engine: Engine
    model_name: str
    block_size: int
    num_blocks: int
    decoder: Model
    """The model; without weights where other processes hold them."""
    lora_base: LoraBase
    """The base model as adapters see it: they must fit it."""
    make_run: MakeRun
    """Makes training runs on the same weights."""
    sampling_defaults: SamplingDefaults
    """Values of the sampling fields that a request leaves out."""
    model_source: Path
    """The file or directory that the model was read from."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids from 0 to below it are valid in prompts, stop ids and outputs."""
        return self.decoder.spec.vocab_size


def assemble(settings: Settings, metrics: Metrics | None = None) -> Assembled:
    """Load the model and build the engine. `metrics`: those of the model before it under the same name; default: new
    ones. Raises `ModelLoadError` with the error and a remedy."""
    training_devices(settings)
    return_freed_memory()
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    checkpoint = open_checkpoint(
        settings.model.model, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    name = settings.model.served_model_name or checkpoint.name
    if (size := tensor_parallel(settings.parallel)) > 1:
        return _assemble_ranks(settings, checkpoint, name, size, metrics)
    device = make_device(settings.model.device)
    decoder = load_model(checkpoint, settings.model, device=device)
    keep_freed_memory()
    cache = _plan_cache(settings, decoder, device_memory(device))
    if settings.model.deterministic and (reason := decoder.batch_variance) is not None:
        raise ModelLoadError(f"model.deterministic cannot be promised for {name}: {reason}.")
    dtype = cache_dtype(settings, decoder)
    lora_base = base_of(decoder, checkpoint, name)
    held_in = lora_dtype(settings.adapters.lora_dtype, settings.model)
    slots = AdapterSlots(
        lora_base,
        decoder,
        max_rank=settings.adapters.max_lora_rank,
        dtype=held_in,
        unused_memory=settings.adapters.unused_memory if device.type == "cpu" else 0,
    )
    cpu, host_blocks = torch.device("cpu"), cache.num_host_blocks
    grammars = _grammars(settings, checkpoint, decoder)
    worker = Worker(
        decoder,
        make_cache(decoder, cache.num_blocks, cache.block_size, device, dtype),
        max_running=settings.scheduler.max_running,
        max_len=cache.max_len,
        host=make_cache(decoder, host_blocks, cache.block_size, cpu, dtype) if host_blocks else None,
        adapters=slots,
        grammars=lambda: grammars,
    )
    if device.type == "cuda":
        graphs = worker.unrecorded or "steps of one token a row"
        log.info(
            "device", name=str(device), attention=decoder.ops.attention, cuda_graphs=graphs, blocks=cache.num_blocks
        )
    executor = InProcessExecutor(worker)
    run = make_run_on(decoder, whole=settings.model.deterministic)
    return _assembled(settings, checkpoint, grammars, executor, decoder, lora_base, cache, run, device, metrics)


def _assemble_ranks(
    settings: Settings, checkpoint: Checkpoint, name: str, size: int, metrics: Metrics | None
) -> Assembled:
    """Build the engine with the model in `size` other processes."""
    from runtime.workers.parallel.executor import DistributedExecutor
    from runtime.workers.parallel.launchers import launcher
    from runtime.workers.parallel.messages import Allocate, LoadModel
    from runtime.workers.parallel.remote_run import make_run_on_ranks

    if settings.scheduler.preemption_mode != "recompute":
        raise ModelLoadError(
            f"scheduler.preemption_mode is {settings.scheduler.preemption_mode!r}, which is for one rank; "
            f"with {size} ranks it can be: recompute."
        )
    if settings.model.deterministic:
        raise ModelLoadError(f"model.deterministic is promised for one rank alone, and parallel.tp is {size}.")
    launch = launcher(settings, size)
    device = make_device(settings.model.device)
    shapes = describe_decoder(checkpoint, settings.model, UnconnectedRank(size))
    adapters = settings.adapters
    load = LoadModel(
        model=settings.model, name=name, max_lora_rank=adapters.max_lora_rank, lora_dtype=adapters.lora_dtype
    )
    executor = DistributedExecutor(launch, load, timeout=settings.parallel.rank_timeout)
    try:
        loaded = executor.loaded
        sharing = 1 if device.type == "cuda" else launch.per_node
        least = min(loaded, key=lambda one: one.free_bytes)
        cache = _plan_cache(settings, shapes, DeviceMemory(least.free_bytes // sharing, least.total_bytes))
        grammars = _grammars(settings, checkpoint, shapes)
        lora_base = LoraBase.described(shapes, find_model(checkpoint.config), name, loaded[0].fingerprint)
        executor.allocate(
            Allocate(
                num_blocks=cache.num_blocks,
                block_size=cache.block_size,
                kv_cache_dtype=str(cache_dtype(settings, shapes)).removeprefix("torch."),
                max_running=settings.scheduler.max_running,
                max_len=cache.max_len,
                eos_ids=grammars.eos_ids,
            )
        )
        executor.set_adapter_base(lora_base)
        make_run = make_run_on_ranks(executor)
        return _assembled(settings, checkpoint, grammars, executor, shapes, lora_base, cache, make_run, device, metrics)
    except BaseException:
        executor.close()
        raise


def tensor_parallel(settings: ParallelSettings) -> int:
    """Number of ranks that share the model. Raises `ModelLoadError` where torchrun started another number of them."""
    from runtime.workers.parallel.torchrun import Torchrun

    torchrun = Torchrun.here()
    if torchrun is not None and settings.tp not in (None, torchrun.size):
        raise ModelLoadError(f"parallel.tp is {settings.tp}, but torchrun started {torchrun.size} ranks.")
    return settings.tp or (1 if torchrun is None else torchrun.size)


def is_under_torchrun() -> bool:
    """True where torchrun has started the ranks: they hold one model from their start to their end."""
    from runtime.workers.parallel.torchrun import Torchrun

    return Torchrun.here() is not None


@dataclass(frozen=True)
class _Cache:
    num_blocks: int
    num_host_blocks: int
    block_size: int
    max_len: int
    """Longest sequence that context and blocks can hold, in tokens."""


def _plan_cache(settings: Settings, decoder: Model, memory: DeviceMemory) -> _Cache:
    context = settings.model.max_model_len or decoder.spec.max_position
    num_blocks = _num_blocks(settings, decoder, context, memory)
    block_size = settings.cache.block_size
    return _Cache(num_blocks, _num_host_blocks(settings, decoder), block_size, min(context, num_blocks * block_size))


def _grammars(settings: Settings, checkpoint: Checkpoint, decoder: Model) -> GrammarCompiler:
    """Compiler of grammars for the model's tokenizer and all ids that end an output."""
    tokenizer, defaults = tokenizer_of(checkpoint, decoder), _defaults(settings, checkpoint, decoder)
    return GrammarCompiler(tokenizer, tuple(dict.fromkeys((*tokenizer.eos_ids, *defaults.eos_ids))))


def _defaults(settings: Settings, checkpoint: Checkpoint, decoder: Model) -> SamplingDefaults:
    model = settings.model
    defaults = sampling_defaults(checkpoint.generation, model.generation_config, model.override_generation_config)
    if wrong := [id for id in defaults.eos_ids if id >= decoder.spec.vocab_size]:
        raise ModelLoadError(
            f"eos_token_id must be below {decoder.spec.vocab_size}, the model's vocabulary, got {wrong}."
        )
    return defaults


def _assembled(
    settings: Settings,
    checkpoint: Checkpoint,
    grammars: GrammarCompiler,
    executor: Executor,
    decoder: Model,
    lora_base: LoraBase,
    cache: _Cache,
    make_run: MakeRun,
    device: torch.device,
    metrics: Metrics | None,
) -> Assembled:
    """`device`: the device of this process or of its ranks."""
    defaults = _defaults(settings, checkpoint, decoder)
    scheduler = make_scheduler(
        settings.scheduler,
        settings.cache,
        cache.num_blocks,
        decoder.spec.window,
        cache.num_host_blocks,
        settings.adapters,
    )
    shape = CacheShape(
        max_model_len=cache.max_len,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        num_host_blocks=cache.num_host_blocks,
        block_bytes=_bytes_of_block(settings, decoder),
    )
    if metrics is None:
        vllm_names, most = settings.observability.vllm_names, settings.adapters.max_loaded
        metrics = Metrics(lora_base.name, vllm_names=vllm_names, max_adapters=most, shape=shape)
    engine = Engine(
        scheduler,
        executor,
        grammars.tokenizer,
        metrics,
        shape,
        max_len=cache.max_len,
        asynchronous=_asynchronous(settings.scheduler.asynchronous, device),
        hooks=Hooks.installed(),
        vocab_size=decoder.spec.vocab_size,
        eos_ids=defaults.eos_ids,
        grammars=grammars,
    )
    return Assembled(
        engine=engine,
        model_name=lora_base.name,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        decoder=decoder,
        lora_base=lora_base,
        make_run=make_run,
        sampling_defaults=defaults,
        model_source=checkpoint.source,
    )


def make_scheduler(
    settings: SchedulerSettings,
    cache: CacheSettings,
    num_blocks: int,
    window: int | None = None,
    num_host_blocks: int = 0,
    adapters: AdapterSettings | None = None,
) -> Scheduler:
    """The scheduler and its block pool. `window`: most tokens that the model attends to; `num_host_blocks`:
    blocks in host memory for the KV of preempted sequences."""
    speculation = None
    if settings.speculative_tokens is not None:
        speculation = Speculation(
            settings.speculative_tokens, settings.speculative_max_running, settings.speculative_min_acceptance
        )
    return Scheduler(
        BlockManager(num_blocks, cache.block_size, prefix_caching=cache.prefix_caching),
        BackgroundLast(make_policy(settings.policy, weights=_tenant_weights(settings.fair_weights))),
        settings,
        speculation=speculation,
        sliding_window=window,
        swap=SwapSpace(num_host_blocks) if num_host_blocks else None,
        adapters=adapters,
    )


def _tenant_weights(items: Iterable[str]) -> dict[str, float]:
    """`scheduler.fair_weights` as tenant → weight. Their form was checked with the settings."""
    return {tenant: float(weight) for tenant, _, weight in (item.partition("=") for item in items)}


def _asynchronous(mode: str, device: torch.device) -> bool:
    """True if steps are planned ahead. "auto" does so on CUDA only: on a CPU, planning and computing share the
    cores."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def fits_beside(settings: Settings, num_blocks: int) -> bool:
    """True where the model of `settings` fits into the memory that is free now, with `num_blocks` of KV cache. Ranks'
    memory is their own processes', and False. Reads headers. Raises `ModelLoadError`."""
    if tensor_parallel(settings.parallel) > 1:
        return False
    checkpoint = open_checkpoint(settings.model.model, revision=settings.model.revision)
    needed = 0
    try:
        shapes = describe_decoder(checkpoint, settings.model, SOLO)
        values = sum(parameter.num_values for parameter in shapes.parameters().values())
        needed = num_blocks * _bytes_of_block(settings, shapes)
    except ModelLoadError:  # it is served through transformers, and its cache is not known yet
        values = sum(math.prod(weight.shape) for _, weight in checkpoint.described())
    device = make_device(settings.model.device)
    needed += round(values * value_bytes(settings.model, device))
    return needed <= device_memory(device).free


def _bytes_of_block(settings: Settings, decoder: Model) -> int:
    return block_bytes(decoder.kv_shapes, block_size=settings.cache.block_size, dtype=cache_dtype(settings, decoder))


def cache_dtype(settings: Settings, decoder: Model) -> torch.dtype:
    """Data type of a model's KV cache, from the setting `cache.kv_cache_dtype`."""
    return CACHE_DTYPES.get(settings.kv_cache_dtype, decoder.dtype)


def _num_host_blocks(settings: Settings, decoder: Model) -> int:
    """Number of blocks in host memory; 0 where preempted KV is recomputed."""
    if settings.scheduler.preemption_mode == "recompute":
        return 0
    size, memory = _bytes_of_block(settings, decoder), settings.cache.swap_memory
    if memory < size:
        raise ModelLoadError(f"cache.swap_memory is {memory} bytes, but one block takes {size}.")
    return memory // size


def _num_blocks(settings: Settings, decoder: Model, context: int, memory: DeviceMemory) -> int:
    """`memory`: of this rank. Of host memory at most a quarter of what is free is taken."""
    cache, size = settings.cache, _bytes_of_block(settings, decoder)
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.kv_memory is not None:
        count = cache.kv_memory // size
        if count == 0:
            raise ModelLoadError(f"cache.kv_memory is {cache.kv_memory} bytes, but one block takes {size}.")
        return count
    each = -(-context // cache.block_size)
    if memory.total is None:
        return max(1, min(DEFAULT_CONTEXTS * each, memory.free // 4 // size))
    return min(settings.scheduler.max_running * each, _blocks_on_gpu(settings, decoder, memory.free, memory.total))


def _blocks_on_gpu(settings: Settings, decoder: Model, free: int, total: int) -> int:
    """Blocks for which a GPU's share has room, beside what is on it already and the tensors of a step."""
    share, size = settings.cache.gpu_memory_utilization, _bytes_of_block(settings, decoder)
    taken, work = total - free, step_bytes(settings, decoder)
    count = (int(total * share) - taken - work) // size
    if count < 1:
        raise ModelLoadError(
            f"cache.gpu_memory_utilization is {share}, of {total} bytes; {taken} are taken, a step needs about {work}, "
            f"and one KV block takes {size}: raise it, or lower scheduler.max_batched_tokens."
        )
    return count


STEP_HIDDEN, STEP_WIDEST, STEP_LOGITS = 6, 3, 6
"""Tensors of a step that are in memory together: of hidden states, of the widest linear's outputs, and of logits."""


def step_bytes(settings: Settings, decoder: Model) -> int:
    """Bytes of what the largest step computes, about, where nothing is kept for training."""
    scheduler, spec = settings.scheduler, decoder.spec
    linears = decoder.layers[0].linears.values()
    widest = max((sum(linear.parts.values()) for linear in linears), default=spec.hidden_size)
    values = scheduler.max_batched_tokens * (STEP_HIDDEN * spec.hidden_size + STEP_WIDEST * widest)
    return values * decoder.dtype.itemsize + STEP_LOGITS * 4 * scheduler.max_running * spec.vocab_size
