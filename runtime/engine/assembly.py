"""From settings to a working engine: has the model loaded, sizes the cache, puts the parts together."""

from dataclasses import dataclass

import psutil
import torch

from runtime.blocks import BlockManager, SwapSpace
from runtime.engine import Engine
from runtime.hooks import Hooks
from runtime.metrics import Metrics
from runtime.model_loading import base_of, describe_decoder, load_model
from runtime.scheduler import Scheduler, Speculation
from runtime.scheduler.policies import make_policy
from runtime.tenants import tenant_weights
from runtime.trainer.run import make_run_on
from runtime.trainer.sliced_run import MakeRun
from runtime.workers.adapter_slots import AdapterSlots
from runtime.workers.determinism import obstacle
from runtime.workers.device import make_device
from runtime.workers.executor import Executor, InProcessExecutor
from runtime.workers.group import Member
from runtime.workers.kv_cache import KVCache, block_bytes
from runtime.workers.loading import Checkpoint, open_checkpoint
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.lora_base import LoraBase
from runtime.workers.memory import keep_freed_memory, return_freed_memory
from runtime.workers.model import Model
from runtime.workers.models import find_model
from runtime.workers.worker import Worker
from settings.schema import CacheSettings, ParallelSettings, SchedulerSettings, Settings

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
DEFAULT_CONTEXTS = 4
"""Without a setting the cache holds so many full contexts, if a quarter of the free memory does."""


@dataclass(frozen=True)
class Assembled:
    """An engine, and what the outside wants to know of its model."""

    engine: Engine
    model_name: str
    block_size: int
    num_blocks: int
    decoder: Model
    """Without weights, where other processes have them."""
    lora_base: LoraBase
    """What adapters must fit."""
    make_run: MakeRun
    """Makes training runs on the same weights."""


def assemble(settings: Settings) -> Assembled:
    """Load the model and build the engine. Raises `ModelLoadError` with what is wrong and what would work."""
    return_freed_memory()
    if settings.model.threads:
        torch.set_num_threads(settings.model.threads)
    checkpoint = open_checkpoint(
        settings.model.model, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    name = settings.model.served_model_name or checkpoint.name
    if (size := tensor_parallel(settings.parallel)) > 1:
        return _assemble_ranks(settings, checkpoint, name, size)
    device = make_device(settings.model.device)
    decoder = load_model(checkpoint, settings.model, device=device)
    keep_freed_memory()
    cache = _plan_cache(settings, decoder, _free_bytes(device))
    if settings.model.deterministic and (reason := obstacle(decoder)) is not None:
        raise ModelLoadError(f"model.deterministic cannot be promised for {name}: {reason}.")
    dtype = cache_dtype(settings, decoder)
    lora_base = base_of(decoder, checkpoint, name)
    slots = AdapterSlots(lora_base, decoder, max_rank=settings.adapters.max_lora_rank)
    cpu, host_blocks = torch.device("cpu"), cache.num_host_blocks
    worker = Worker(
        decoder,
        make_cache(decoder, cache.num_blocks, cache.block_size, device, dtype),
        max_running=settings.scheduler.max_running,
        max_len=cache.max_len,
        host=make_cache(decoder, host_blocks, cache.block_size, cpu, dtype) if host_blocks else None,
        adapters=slots,
    )
    executor = InProcessExecutor(worker)
    return _assembled(settings, checkpoint, executor, decoder, lora_base, cache, make_run_on(decoder), device)


def _assemble_ranks(settings: Settings, checkpoint: Checkpoint, name: str, size: int) -> Assembled:
    """With the model in `size` other processes."""
    from runtime.ranks.executor import DistributedExecutor
    from runtime.ranks.launchers import launcher
    from runtime.ranks.messages import Allocate, Load
    from runtime.ranks.remote_run import make_run_on_ranks

    if settings.scheduler.preemption_mode != "recompute":
        raise ModelLoadError(
            f"scheduler.preemption_mode is {settings.scheduler.preemption_mode!r}, which is for one rank; "
            f"with {size} ranks it can be: recompute."
        )
    if settings.model.deterministic:
        raise ModelLoadError(f"model.deterministic is promised for one rank alone, and parallel.tp is {size}.")
    launch = launcher(settings, size)
    device = make_device(settings.model.device)
    shapes = describe_decoder(checkpoint, settings.model, Member(size))
    load = Load(model=settings.model, name=name, max_lora_rank=settings.adapters.max_lora_rank)
    executor = DistributedExecutor(launch, load, timeout=settings.parallel.rank_timeout)
    try:
        loaded = executor.loaded
        sharing = 1 if device.type == "cuda" else launch.per_node
        cache = _plan_cache(settings, shapes, min(one.free_bytes for one in loaded) // sharing)
        lora_base = LoraBase.described(shapes, find_model(checkpoint.config), name, loaded[0].fingerprint)
        executor.allocate(
            Allocate(
                num_blocks=cache.num_blocks,
                block_size=cache.block_size,
                kv_cache_dtype=str(cache_dtype(settings, shapes)).removeprefix("torch."),
                max_running=settings.scheduler.max_running,
                max_len=cache.max_len,
            )
        )
        executor.base = lora_base
        make_run = make_run_on_ranks(executor)
        return _assembled(settings, checkpoint, executor, shapes, lora_base, cache, make_run, device)
    except BaseException:
        executor.close()
        raise


def tensor_parallel(settings: ParallelSettings) -> int:
    """How many ranks share the model. Raises `ModelLoadError` where torchrun started another number of them."""
    from runtime.ranks.torchrun import Torchrun

    torchrun = Torchrun.here()
    if torchrun is not None and settings.tp not in (None, torchrun.size):
        raise ModelLoadError(f"parallel.tp is {settings.tp}, but torchrun started {torchrun.size} ranks.")
    return settings.tp or (1 if torchrun is None else torchrun.size)


@dataclass(frozen=True)
class _Cache:
    num_blocks: int
    num_host_blocks: int
    block_size: int
    max_len: int
    """Longest sequence that context and blocks can hold."""


def _plan_cache(settings: Settings, decoder: Model, free: int) -> _Cache:
    context = settings.model.max_model_len or decoder.spec.max_position
    num_blocks = _num_blocks(settings, decoder, context, free)
    block_size = settings.cache.block_size
    return _Cache(num_blocks, _num_host_blocks(settings, decoder), block_size, min(context, num_blocks * block_size))


def _assembled(
    settings: Settings,
    checkpoint: Checkpoint,
    executor: Executor,
    decoder: Model,
    lora_base: LoraBase,
    cache: _Cache,
    make_run: MakeRun,
    device: torch.device,
) -> Assembled:
    """`device`: that of this process or of its ranks."""
    scheduler = make_scheduler(
        settings.scheduler, settings.cache, cache.num_blocks, decoder.spec.window, cache.num_host_blocks
    )
    metrics = Metrics(
        lora_base.name,
        vllm_names=settings.observability.vllm_names,
        max_model_len=cache.max_len,
        block_size=cache.block_size,
        num_blocks=cache.num_blocks,
        max_adapters=settings.adapters.max_loaded,
        num_host_blocks=cache.num_host_blocks,
        block_bytes=_bytes_of_block(settings, decoder),
    )
    engine = Engine(
        scheduler,
        executor,
        checkpoint.tokenizer,
        metrics,
        max_len=cache.max_len,
        asynchronous=_asynchronous(settings.scheduler.asynchronous, device),
        hooks=Hooks.installed(),
    )
    return Assembled(engine, lora_base.name, cache.block_size, cache.num_blocks, decoder, lora_base, make_run)


def make_cache(decoder: Model, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    """A KV cache for the decoder, on its device or in the memory beside it."""
    return KVCache(
        decoder.kv_shapes,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=dtype,
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


def _asynchronous(mode: str, device: torch.device) -> bool:
    """On a CPU planning and computing share the cores, and there is nothing to be gained."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)


def _bytes_of_block(settings: Settings, decoder: Model) -> int:
    return block_bytes(decoder.kv_shapes, block_size=settings.cache.block_size, dtype=cache_dtype(settings, decoder))


def cache_dtype(settings: Settings, decoder: Model) -> torch.dtype:
    """What the setting `cache.kv_cache_dtype` means for a model."""
    return CACHE_DTYPES.get(settings.kv_cache_dtype, decoder.dtype)


def _num_host_blocks(settings: Settings, decoder: Model) -> int:
    """0 where what is preempted is computed again."""
    if settings.scheduler.preemption_mode == "recompute":
        return 0
    size, memory = _bytes_of_block(settings, decoder), settings.cache.swap_memory
    if memory < size:
        raise ModelLoadError(f"cache.swap_memory is {memory} bytes, but one block takes {size}.")
    return memory // size


def _num_blocks(settings: Settings, decoder: Model, context: int, free: int) -> int:
    """`free`: bytes that this rank could have, a quarter of which is taken at most."""
    cache, size = settings.cache, _bytes_of_block(settings, decoder)
    if cache.num_blocks is not None:
        return cache.num_blocks
    if cache.kv_memory is not None:
        count = cache.kv_memory // size
        if count == 0:
            raise ModelLoadError(f"cache.kv_memory is {cache.kv_memory} bytes, but one block takes {size}.")
        return count
    return max(1, min(DEFAULT_CONTEXTS * -(-context // cache.block_size), free // 4 // size))
