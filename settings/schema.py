"""Every setting of Eft, once: type, default and a line of documentation.

CLI flags, `EFT_…` environment variables, the TOML file and `eft config show` are all made from
these structs (see `settings.load`). Field names are unique over all sections, so that a flag is
just the field's name: `scheduler.max_batched_tokens` is `--max-batched-tokens`.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from settings.units import Bytes, Count, Seconds


def doc(text: str, *, example: object = None, secret: bool = False, expects: str | None = None) -> Meta:
    """The one line that `--help` and the reference page print for a field.

    `example` is a value for the example file, where the default (None) has no TOML form; the value of
    a `secret` field is never printed. `expects` says what a value must be, where the type does not.
    """
    return Meta(
        description=text,
        examples=None if example is None else [example],
        extra={"secret": secret, "expects": expects},
    )


NonEmpty = Annotated[str, Meta(min_length=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Share = Annotated[float, Meta(ge=0.0, le=0.9)]
TenantWeight = Annotated[str, Meta(pattern=r"^[0-9a-f]{12}=(?!0+(\.0+)?$)[0-9]{1,6}(\.[0-9]{1,6})?$")]
Device = Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")]


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which weights to serve, and how to hold them."""

    model: Annotated[NonEmpty, doc("A model directory, a GGUF file, a hub id, or `demo` (SmolLM2-135M-Instruct).")] = (
        "demo"
    )
    revision: Annotated[NonEmpty | None, doc("Branch, tag or commit of a hub id.", example="main")] = None
    served_model_name: Annotated[
        NonEmpty | None, doc("Name in the API; default: the model's own name.", example="my-model")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        doc("Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU. A CPU computes in float32 always."),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "int4", "nf4", "gguf"],
        doc(
            "int8: a quarter of float32's memory, a scale an output; int4: a sixth, a scale and a minimum for "
            "32 inputs; nf4: as much, in floats; embeddings and logits are int8 then. gguf: a GGUF file's own blocks "
            "(Q4_0, Q4_1, Q8_0)."
        ),
    ] = "none"
    device: Annotated[Device, doc("auto, cpu, cuda or cuda:N.")] = "auto"
    max_model_len: Annotated[Count | None, doc("Context length in tokens; default: the model's own.", example="8K")] = (
        None
    )
    chat_template: Annotated[
        NonEmpty | None,
        doc(
            "File with a Jinja chat template to use instead of the model's own.",
            example="chat_template.jinja",
        ),
    ] = None
    kernels: Annotated[
        Literal["auto", "reference", "cpu", "triton"],
        doc("Backend of the ops; auto takes the fastest one that works here."),
    ] = "auto"
    deterministic: Annotated[
        bool, doc("Refuse a model whose answers could depend, bit by bit, on what else runs beside them.")
    ] = False
    threads: Annotated[
        Count | None, doc("CPU threads for the ops; default: all cores this process may use.", example=4)
    ] = None


class ParallelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ranks that share one model (tensor parallelism)."""

    tp: Annotated[
        Count | None,
        doc("Ranks that share the model, a process each; default: as many as torchrun started, else 1.", example=2),
    ] = None
    rank_timeout: Annotated[
        Seconds, doc("A rank that has not answered for so long is lost: running requests fail, all ranks start again.")
    ] = 60.0
    interface: Annotated[
        NonEmpty | None,
        doc("Network interface between ranks; default: loopback on one node.", example="eth0"),
    ] = None


class CacheSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paged KV cache."""

    block_size: Annotated[Count, doc("Tokens in one KV block.")] = 16
    kv_memory: Annotated[
        Bytes | None,
        doc(
            "Memory of a rank for KV blocks; default: enough for 4 full contexts, at most a quarter of what is free.",
            example="4GiB",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        doc(
            "Type of what the cache holds; auto is the type that is computed in, but bfloat16 where weights are "
            "quantised. int8 has a scale a token and head."
        ),
    ] = "auto"
    num_blocks: Annotated[Count | None, doc("KV blocks, instead of a memory size.", example=1024)] = None
    prefix_caching: Annotated[bool, doc("Reuse the KV of prompts that begin alike.")] = True
    swap_memory: Annotated[
        Bytes, doc("Host memory for the KV of preempted sequences, where scheduler.preemption_mode is swap.")
    ] = 4 * 1024**3


class SchedulerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes into a step, and who goes first."""

    policy: Annotated[
        Literal["fcfs", "priority", "deadline", "fair"],
        doc("Order of the requests: by arrival, by `priority`, by `deadline_ms`, or in turns between API keys."),
    ] = "fcfs"
    fair_weights: Annotated[
        tuple[TenantWeight, ...],
        doc(
            "Shares under policy fair, 1 by default: TENANT=WEIGHT, a tenant being the first 12 digits of sha256(key).",
            expects="a list of TENANT=WEIGHT, with 12 hexadecimal digits and a number above 0",
        ),
    ] = ()
    max_batched_tokens: Annotated[Count, doc("Most tokens computed in one step, over all sequences.")] = 512
    max_prefill_chunk: Annotated[
        Count | None,
        doc("Most tokens of one sequence in one step; default: max_batched_tokens.", example=256),
    ] = None
    max_running: Annotated[Count, doc("Most sequences running at once.")] = 64
    max_waiting: Annotated[Count, doc("Most sequences waiting; one more is answered 429.")] = 1024
    max_waiting_tokens: Annotated[Count, doc("Most prompt tokens waiting; more are answered 429.")] = 1024**2
    preemption_mode: Annotated[
        Literal["recompute", "swap"],
        doc("Compute the KV of a preempted sequence again, or keep it in host memory (for GPUs)."),
    ] = "recompute"
    max_preemptions: Annotated[
        Count, doc("After so many preemptions a request comes in only with room for all of its output, and stays.")
    ] = 4
    asynchronous: Annotated[
        Literal["auto", "on", "off"],
        doc("Plan a step while the one before it is computed; auto does so on a GPU."),
    ] = "auto"
    speculative_tokens: Annotated[
        Count | None,
        doc("Most tokens to guess ahead from what a sequence repeats; default: none.", example=4),
    ] = None
    speculative_max_running: Annotated[Count, doc("With more sequences running nothing is guessed.")] = 8
    speculative_min_acceptance: Annotated[
        Share, doc("A sequence of whose guesses fewer than this prove right stops guessing for a while.")
    ] = 0.3
    ttft_target: Annotated[
        Seconds, doc("Training gives way so that first tokens come in this time, where serving alone would do it.")
    ] = 1.0
    tpot_target: Annotated[
        Seconds | None,
        doc(
            "Time per output token that training must leave; default: 1.35 times what it is without training.",
            example="50ms",
        ),
    ] = None


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP server."""

    host: Annotated[NonEmpty, doc("Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, doc("Port to listen on; 0 takes a free one and prints it.")] = 8000
    api_key: Annotated[
        tuple[NonEmpty, ...],
        doc(
            "Keys that clients must send as `Authorization: Bearer …`; none: no key is asked for.",
            secret=True,
        ),
    ] = ()
    admin_key: Annotated[
        tuple[NonEmpty, ...],
        doc("Keys for /admin and for loading adapters; none: clients on this machine only.", secret=True),
    ] = ()
    public_metrics: Annotated[bool, doc("Serve /metrics without a key.")] = True
    docs_enabled: Annotated[bool, doc("Serve the OpenAPI schema and the API reference.")] = True
    max_body: Annotated[Bytes, doc("Largest request body.")] = 32 * 1024**2
    header_timeout: Annotated[Seconds, doc("A request's headers must be complete in this time.")] = 10.0
    body_timeout: Annotated[Seconds, doc("A request's body must be complete in this time.")] = 60.0
    write_timeout: Annotated[Seconds, doc("A client that reads nothing for this long is cut off.")] = 60.0
    drain_timeout: Annotated[Seconds, doc("On SIGTERM, running requests get this long to finish.")] = 30.0
    step_timeout: Annotated[Seconds, doc("/health answers 503 when a step takes longer than this.")] = 120.0


class AdapterSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """LoRA adapters that are served beside the base model."""

    max_loaded: Annotated[
        Count, doc("Most adapter versions in memory; one more takes the place of the one unused for longest.")
    ] = 16
    max_lora_rank: Annotated[Count, doc("Largest rank of an adapter that is loaded or trained.")] = 256


class TrainerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fine-tuning jobs in the serving process."""

    state_dir: Annotated[
        NonEmpty | None,
        doc(
            "Folder of jobs, checkpoints, uploaded files and adapters; default: ~/.local/state/eft.",
            example="/var/lib/eft",
        ),
    ] = None
    data_roots: Annotated[
        tuple[NonEmpty, ...], doc("Folders from which recipes may read data and adapters may be loaded.")
    ] = ()
    min_share: Annotated[Share, doc("Share of the time that a running job gets even when requests never pause.")] = 0.2
    max_queued_jobs: Annotated[Count, doc("Most jobs waiting; one more is answered 429.")] = 100
    max_recipe: Annotated[Bytes, doc("Largest recipe.")] = 1024**2
    max_upload: Annotated[Bytes, doc("Largest body of a recipe with its data files.")] = 512 * 1024**2


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Caps on single requests; beyond them the answer is a 400 that names the cap."""

    max_stop: Annotated[Count, doc("Most stop strings in a request.")] = 16
    max_n: Annotated[Count, doc("Most choices (`n`) in a request.")] = 64
    max_prompts: Annotated[Count, doc("Most prompts in one completions request.")] = 256
    max_messages: Annotated[Count, doc("Most messages in a chat.")] = 4096
    unknown_fields: Annotated[
        Literal["ignore", "warn", "reject"],
        doc("Fields that we do not know: warn names them in the X-Eft-Warning header and the log."),
    ] = "warn"


class ObservabilitySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs and metrics."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], doc("Least severe level to log.")] = "info"
    log_format: Annotated[Literal["auto", "console", "json"], doc("auto is console on a terminal, json otherwise.")] = (
        "auto"
    )
    log_requests: Annotated[bool, doc("Log one line per request (never its text).")] = True
    vllm_names: Annotated[bool, doc("Export every metric under its `vllm:` name as well.")] = True


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings, by section. The sections are the tables of the TOML file."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    observability: ObservabilitySettings = field(default_factory=ObservabilitySettings)

    @property
    def kv_cache_dtype(self) -> str:
        """`cache.kv_cache_dtype`; "auto" then is the type that is computed in."""
        asked = self.cache.kv_cache_dtype
        # Integers round far more than bfloat16 does, and it is half of the memory to read.
        return "bfloat16" if asked == "auto" and self.model.quantization != "none" else asked
