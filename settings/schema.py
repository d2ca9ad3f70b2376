"""Every setting of Eft, once: type, default and a line of documentation.

CLI flags, `EFT_…` environment variables, the TOML file and `eft config show` are all made from
these structs (see `settings.load`). Field names are unique over all sections, so that a flag is
just the field's name: `scheduler.max_batched_tokens` is `--max-batched-tokens`.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from settings.api import FeedbackSettings, FileSettings, LimitSettings, ResponseSettings, ServerSettings
from settings.units import (
    Bytes,
    BytesOrNone,
    Count,
    Device,
    HubAdapter,
    LatencyRatio,
    LoggedShare,
    NonEmpty,
    NonzeroShare,
    Percentile,
    Restarts,
    Seconds,
    Share,
    TenantWeight,
    TrainingDevice,
    doc,
)

MAX_RECIPE = 128 * 1024
"""Bytes: reading YAML takes seconds a megabyte."""


class ModelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The weights to serve, and their form in memory."""

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
    cache_quantised: Annotated[
        bool,
        doc(
            "Keep weights that were quantised on a CPU (int8, int4, nf4) below the cache directory, the last four, and "
            "map them at the next start."
        ),
    ] = True
    device: Annotated[Device, doc("auto, cpu, cuda or cuda:N.")] = "auto"
    max_model_len: Annotated[Count | None, doc("Context length in tokens; default: the model's own.", example="8K")] = (
        None
    )
    chat_template: Annotated[
        NonEmpty | None,
        doc(
            "Chat template to use instead of the model's own: a file of Jinja, or the name of a built-in one (alpaca, "
            "chatml, gemma, llama2, llama3, mistral, phi3, qwen2.5, vicuna, zephyr).",
            example="chat_template.jinja",
        ),
    ] = None
    tool_parser: Annotated[
        Literal[
            "auto", "hermes", "llama3_json", "mistral", "mistral_args", "granite", "phi4", "pythonic", "qwen3_coder"
        ],
        doc("Form in which the model writes calls of tools; auto tells it from the chat template, else hermes."),
    ] = "auto"
    reasoning_parser: Annotated[
        Literal["auto", "none", "deepseek_r1", "qwen3", "mistral", "granite", "seed_oss"],
        doc("Form of the model's reasoning, which is split from its answers; auto tells it from the chat template."),
    ] = "auto"
    trust_request_chat_template: Annotated[
        bool,
        doc(
            "Take a `chat_template` that a request brings. A template is a program: it sees no files, but it may never "
            "end, so this is for clients that are trusted."
        ),
    ] = False
    generation_config: Annotated[
        NonEmpty,
        doc(
            "Sampling of requests that do not say: `auto` is the model's generation_config.json, `none` is neutral, "
            "else a folder or file with one, whose max_new_tokens then is a limit."
        ),
    ] = "auto"
    override_generation_config: Annotated[
        NonEmpty | None,
        doc(
            "JSON with values to use instead: temperature, top_p, top_k, min_p, max_new_tokens (a limit for every "
            "request), eos_token_id.",
            example='{"temperature": 0.5}',
        ),
    ] = None
    kernels: Annotated[
        Literal["auto", "reference", "cpu", "triton"],
        doc("Backend of the ops; auto takes the fastest one that works here."),
    ] = "auto"
    deterministic: Annotated[
        bool,
        doc(
            "Refuse a model whose answers could depend, bit by bit, on what else runs beside them. Training is not cut "
            "to fit between steps then: its result does not depend on requests either, and they wait longer."
        ),
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
            "Memory of a rank for KV blocks; default: on a GPU what gpu_memory_utilization leaves, in host memory "
            "enough for 4 full contexts, at most a quarter of what is free.",
            example="4GiB",
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        NonzeroShare,
        doc(
            "Share of a GPU's memory for weights, KV blocks and the tensors of a step, and for what other processes "
            "have on it; the rest is for training."
        ),
    ] = 0.8
    kv_cache_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        doc(
            "Type of what the cache holds; auto is the type that is computed in, but bfloat16 where weights are "
            "quantised. int8 has a scale a token and head."
        ),
    ] = "auto"
    num_blocks: Annotated[Count | None, doc("KV blocks, instead of a memory size.", example=1024)] = None
    prefix_caching: Annotated[bool, doc("Reuse the KV of prompts that begin alike.")] = True
    share_prefixes: Annotated[
        bool,
        doc(
            "Share cached prefixes between API keys. Saves memory where prompts are common, and tells each key, by "
            "`cached_tokens`, what others have sent."
        ),
    ] = False
    swap_memory: Annotated[
        Bytes, doc("Host memory for the KV of preempted sequences, where scheduler.preemption_mode is swap.")
    ] = 4 * 1024**3


class SchedulerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Composition of a step, and the order of requests."""

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
        Count,
        doc("After this number of preemptions a request is admitted only with room for all of its output, and stays."),
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
            "Time per output token that training must leave, and prompts in chunks too; default: of training as "
            "`tpot_ratio` says, of prompts none.",
            example="50ms",
        ),
    ] = None
    tpot_ratio: Annotated[
        LatencyRatio, doc("The same without `tpot_target`, in times of what a token takes without training.")
    ] = 1.3
    tpot_percentile: Annotated[
        Percentile, doc("Share of tokens for which the time per output token holds beside training and prompts.")
    ] = 0.95


class AdapterSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """LoRA adapters that are served beside the base model."""

    max_loaded: Annotated[
        Count,
        doc(
            "Most adapter versions in memory; one more takes the place of the one unused for longest, and waits while "
            "all are in use."
        ),
    ] = 16
    max_place_wait: Annotated[
        Seconds,
        doc(
            "Requests for a version that is not in memory wait in the queue for a place. After this time they are "
            "promised the next place in use: its version takes no new requests until they had their turn."
        ),
    ] = 0.5
    unused_memory: Annotated[
        Bytes,
        doc(
            "Memory for versions that gave up their place: their next load reads no weights. Used on a CPU, by a model "
            "in one process; 0: none is kept."
        ),
    ] = 512 * 1024**2
    max_lora_rank: Annotated[Count, doc("Largest rank of an adapter that is loaded or trained.")] = 256
    max_vocabulary_bytes: Annotated[
        Bytes,
        doc(
            "Most memory that the rows of embedding and head of one adapter may take as they are served: those of new "
            "tokens, and whole copies (`lora_modules_to_save`)."
        ),
    ] = 2 * 1024**3
    lora_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "int8"],
        doc(
            "Type in which a CPU holds adapters to serve them; sums are float32's. auto: int8 beside a base in "
            "integers, else the base's type; with `deterministic` float32. What is trained and stored is float32."
        ),
    ] = "auto"
    resolve_folder: Annotated[
        NonEmpty | None,
        doc(
            "Folder of PEFT's folders: where a request names an adapter that the server does not know, the folder of "
            "this name in it is published and served. Default: none, and unknown names are answered 404.",
            example="/srv/adapters",
        ),
    ] = None
    resolve_hub: Annotated[
        tuple[HubAdapter, ...],
        doc(
            "Adapters on the hub that are fetched when a request first names them: NAME=ORG/REPO, or "
            "NAME=ORG/REPO@REVISION.",
            expects="a list of NAME=ORG/REPO or NAME=ORG/REPO@REVISION",
        ),
    ] = ()
    shared_store: Annotated[
        NonEmpty | None,
        doc(
            "Directory or URL (s3://…, gs://…) of adapters that several servers share: what one publishes, the others "
            "serve within seconds. Default: none.",
            example="s3://bucket/adapters",
        ),
    ] = None
    max_adapter_upload: Annotated[Bytes, doc("Largest upload of an adapter, as it is sent and unpacked.")] = 2 * 1024**3


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
    hub: Annotated[
        bool, doc("Recipes may name data sets of a hub by id; they are fetched by `datasets` (extra `hub`).")
    ] = False
    scorers: Annotated[
        tuple[NonEmpty, ...],
        doc(
            "Functions of yours that recipes may name to compare generated answers, `module:function` of "
            "(prompt, answer, reference) to a number."
        ),
    ] = ()
    min_share: Annotated[Share, doc("Share of the time that a running job gets even when requests never pause.")] = 0.2
    riding_rows: Annotated[
        int,
        Meta(ge=0, le=64),
        doc(
            "Most tokens of training that ride in a step that decodes: their forward pass is computed beside the "
            "requests' rows, from one reading of the weights. How many do is learned from what they cost. For "
            "weights in float32 or bfloat16 on the CPU. 0: none.",
        ),
    ] = 0
    devices: Annotated[
        tuple[TrainingDevice, ...],
        doc(
            "Devices set aside for jobs in processes of their own, which train all weights or spread over several "
            "devices: `cuda:N`, none that serves, or `cpu` once for each rank.",
            expects="a list of `cuda:N`, or of `cpu`",
        ),
    ] = ()
    max_restarts: Annotated[
        Restarts,
        doc("A job of its own processes is started again this often when they are killed without a step in between."),
    ] = 3
    stall_timeout: Annotated[
        Seconds,
        doc(
            "Ranks of such a job of which none begins a part of its work for this long hang: their processes are "
            "killed, and count as killed. A part is a micro-batch forward or backward, or a checkpoint."
        ),
    ] = 1200.0
    outlive_server: Annotated[
        bool,
        doc(
            "The processes of such a job go on when the server is killed, and its next start follows them again; "
            "otherwise they die with it."
        ),
    ] = False
    nodes: Annotated[Count, doc("Nodes that such a job runs on, each with as many ranks as `devices`.")] = 1
    rendezvous: Annotated[
        NonEmpty | None,
        doc("`host:port` at which the nodes meet; torchrun on one of them listens there.", example="node-0:29400"),
    ] = None
    max_running_jobs: Annotated[
        Count,
        doc(
            "Most jobs that train at once, together where they can; more wait, as do jobs for which there is no memory."
        ),
    ] = 1
    job_weight: Annotated[
        float,
        Meta(gt=0.0, le=1000.0),
        doc(
            "Share of the training time that a job gets beside others, in relation to theirs; a recipe's own "
            "`job_weight` goes first.",
            expects="a number above 0 and at most 1000",
        ),
    ] = 1.0
    job_memory: Annotated[
        Bytes | None,
        doc(
            "Memory that jobs running at once may take together, by their plans; one alone always starts. Default: "
            "half of what is free when a second job is to start.",
            example="8GiB",
        ),
    ] = None
    max_queued_jobs: Annotated[Count, doc("Most jobs waiting; one more is answered 429.")] = 100
    max_recipe: Annotated[
        Bytes, Meta(le=MAX_RECIPE), doc("Largest recipe; at most 128KiB.", expects="a size of at most 128KiB")
    ] = MAX_RECIPE
    max_upload: Annotated[Bytes, doc("Largest body of a recipe with its data files.")] = 512 * 1024**2
    keep_jobs: Annotated[
        Seconds | None,
        doc(
            "Delete a job this long after its end, with all its files; what it published stays. Default: never.",
            example="180d",
        ),
    ] = None
    keep_checkpoints: Annotated[
        Seconds, doc("Delete the checkpoints of a job, with its optimiser's state, this long after its end.")
    ] = 14 * 86400.0
    keep_uploads: Annotated[Seconds, doc("Delete the data files sent along with a job this long after its end.")] = (
        30 * 86400.0
    )
    prepared_cache: Annotated[
        BytesOrNone, doc("Most bytes of tokenised data that later jobs of the same data go on with; 0: none is kept.")
    ] = 2 * 1024**3


class ObservabilitySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs and metrics."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], doc("Least severe level to log.")] = "info"
    log_format: Annotated[Literal["auto", "console", "json"], doc("auto is console on a terminal, json otherwise.")] = (
        "auto"
    )
    log_requests: Annotated[bool, doc("Log one line per request (never its text).")] = True
    log_share: Annotated[
        LoggedShare,
        doc("Share of the requests that are logged, 0 to 1; failed and slow ones are always logged."),
    ] = 1.0
    slow_request: Annotated[Seconds, doc("Time from which on a request counts as slow.")] = 10.0
    tracing: Annotated[
        bool,
        doc(
            "Export OpenTelemetry spans of requests and jobs, to where OTEL_EXPORTER_OTLP_ENDPOINT says (extra `otel`)."
        ),
    ] = False
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
    files: FileSettings = field(default_factory=FileSettings)
    responses: ResponseSettings = field(default_factory=ResponseSettings)
    feedback: FeedbackSettings = field(default_factory=FeedbackSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    observability: ObservabilitySettings = field(default_factory=ObservabilitySettings)

    @property
    def kv_cache_dtype(self) -> str:
        """`cache.kv_cache_dtype`; "auto" then is the type that is computed in."""
        asked = self.cache.kv_cache_dtype
        # Integers round far more than bfloat16 does, and it is half of the memory to read.
        return "bfloat16" if asked == "auto" and self.model.quantization != "none" else asked
