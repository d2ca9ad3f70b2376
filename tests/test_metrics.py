"""The exposition: names, labels, buckets, and what promtool thinks of it."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from runtime.events import EvalEvent, StepEvent
from runtime.messages import RequestTiming
from runtime.metrics import TABLE, UNMATCHED, CacheShape, EngineGauges, EngineLoad, Metrics, render_process
from runtime.model.model import gpu_usage
from runtime.support.machine import GpuUsage

# What vLLM's dashboards ask for, from its documentation of metrics.
VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "request_success",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens_cached",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_inference_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
    "iteration_tokens_total",
    "request_params_n",
    "request_num_preemptions",
    "engine_sleep_state",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
]


SHAPE = CacheShape(max_model_len=512, block_size=16, num_blocks=8, num_host_blocks=6, block_bytes=1000)


def make(*, vllm_names: bool = True) -> Metrics:
    return Metrics("m", vllm_names=vllm_names, shape=SHAPE)


def busy() -> Metrics:
    """Metrics of which every family has a sample."""
    metrics = make()
    timing = RequestTiming(
        arrival=10.0, scheduled=11.0, prompt_tokens=40, cached_tokens=16, max_tokens=9, preemptions=1
    )
    metrics.on_prefix_lookup(40, 16)
    metrics.on_tokens(timing, 1, 13.0)
    timing.first_token = timing.last_token = 13.0
    metrics.on_tokens(timing, 2, 17.0)
    timing.last_token, timing.generated_tokens = 17.0, 3
    timing.finished, timing.finish_reason = 17.5, "stop"
    metrics.on_finish(timing)
    engine = metrics.open_engine(SHAPE)
    engine.on_step(EngineLoad(running=1, waiting=3, deferred=1, used_blocks=4, swapped_blocks=3))
    metrics.on_preemptions(1)
    metrics.on_swap(out=5, back=2)
    metrics.on_rejection("queue_full")
    metrics.on_request(choices=2, longest=3)
    metrics.on_http("POST", 200, "/v1/completions", 0.3)
    metrics.on_train_step(
        StepEvent(
            step=1,
            epoch=0.1,
            loss=2.5,
            learning_rate=1e-4,
            grad_norm=1.0,
            tokens=300,
            trained_tokens=100,
            accuracy=0.5,
            seconds=4.0,
            busy_seconds=3.0,
        ),
        "ftjob-1",
    )
    metrics.on_slice(0.003, slack_used=0.5)
    metrics.on_ride(8)
    metrics.on_ride(4)
    metrics.on_target_miss("tpot")
    metrics.on_eval(EvalEvent(step=1, loss=1.5, accuracy=0.75, tokens=50, metrics={"rewards/margins": 0.25}))
    metrics.on_jobs({"running": 1, "queued": 2})
    metrics.on_loop(lag=0.001, tasks=3)
    metrics.on_gpus([GpuUsage(index=0, used=30, total=100, busy=0.25)])
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """`name{labels}`, labels in alphabetical order and without model_name → value."""
    return dict(_samples(metrics.render()[0].decode()))


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for family in parse(text):
        for sample in family.samples:
            labels = {name: value for name, value in sorted(sample.labels.items()) if name != "model_name"}
            shown = ",".join(f"{name}={value}" for name, value in labels.items())
            yield f"{sample.name}{{{shown}}}" if shown else sample.name, sample.value


def test_names_of_the_table_are_unique() -> None:
    names = [spec.name for spec in TABLE]
    assert len(names) == len(set(names))


def test_every_vllm_family_is_there_under_both_names() -> None:
    families = {family.name for family in parse(busy().render()[0].decode())}
    for name in VLLM_NAMES:
        assert {f"eft:{name}", f"vllm:{name}"} <= families
    assert "eft:http_requests" in families
    assert "http_requests" in families


def test_both_names_tell_the_same() -> None:
    values = samples(busy())
    for name in ("generation_tokens_total", "num_requests_waiting", "request_prompt_tokens_sum"):
        assert values[f"eft:{name}"] == values[f"vllm:{name}{{engine=0}}"]


def test_second_names_can_be_off() -> None:
    families = {family.name for family in parse(make(vllm_names=False).render()[0].decode())}
    assert {name for name in families if not name.startswith("eft:")} == set()


def test_what_is_swapped() -> None:
    values = samples(busy())
    assert values["eft:swap_out_blocks_total"] == 5
    assert values["eft:swap_in_blocks_total"] == 2
    assert values["eft:swap_used_bytes"] == 3000
    assert values["eft:swap_capacity_bytes"] == 6000


def test_what_prompts_get_beside_streams() -> None:
    metrics = Metrics("m", vllm_names=False, shape=SHAPE)
    metrics.on_prompt_pace(0, 0, late=0, reserve=0.25)  # nothing was decided
    metrics.on_prompt_pace(2, 120, late=1, reserve=0.125)
    text = metrics.render()[0].decode()
    assert 'eft:prompt_chunk_tokens_count{model_name="m"} 2.0' in text
    assert 'eft:prompt_chunk_tokens_sum{model_name="m"} 120.0' in text
    assert 'eft:prompt_target_misses_total{model_name="m"} 1.0' in text
    assert 'eft:prompt_reserve{model_name="m"} 0.125' in text


def test_the_life_of_a_request() -> None:
    values = samples(busy())
    assert values["eft:generation_tokens_total"] == 3
    assert values["eft:prompt_tokens_total"] == 40
    assert values["eft:prompt_tokens_cached_total"] == 16
    assert values["eft:time_to_first_token_seconds_sum"] == 3.0
    assert values["eft:inter_token_latency_seconds_sum"] == 4.0
    assert values["eft:e2e_request_latency_seconds_sum"] == 7.5
    assert values["eft:request_queue_time_seconds_sum"] == 1.0
    assert values["eft:request_prefill_time_seconds_sum"] == 2.0
    assert values["eft:request_decode_time_seconds_sum"] == 4.0
    assert values["eft:request_inference_time_seconds_sum"] == 6.0
    assert values["eft:request_time_per_output_token_seconds_sum"] == 2.0  # 4 seconds for 2 tokens
    assert values["eft:request_prefill_kv_computed_tokens_sum"] == 24
    assert values["eft:request_params_max_tokens_sum"] == 9
    assert values["eft:request_success_total{finished_reason=stop}"] == 1
    assert values["eft:prefix_cache_hits_total"] == 16
    assert values["eft:num_requests_waiting_by_reason{reason=capacity}"] == 2
    assert values["eft:num_requests_waiting_by_reason{reason=deferred}"] == 1
    assert values["eft:cache_config_info{block_size=16,max_model_len=512,num_gpu_blocks=8}"] == 1


def test_training() -> None:
    values = samples(busy())
    assert values["eft:train_loss"] == 2.5
    assert values["eft:train_tokens_total"] == 300
    assert values["eft:train_step_seconds_sum"] == 4.0
    assert values["eft:train_slice_seconds_sum"] == 0.003
    assert values["eft:train_share"] == 0.75
    assert values["eft:train_slack_used"] == 0.5
    assert values["eft:train_riding_rows"] == 4
    assert values["eft:train_riding_tokens_total"] == 12
    assert values["eft:train_target_misses_total{target=tpot}"] == 1
    assert values["eft:train_target_misses_total{target=ttft}"] == 0
    assert values["eft:eval_metric{name=accuracy}"] == 0.75
    assert values["eft:eval_metric{name=loss}"] == 1.5
    assert values["eft:eval_metric{name=rewards/margins}"] == 0.25
    assert values["eft:jobs{state=queued}"] == 2
    assert not any(name.startswith("vllm:train") for name in values)


@pytest.mark.parametrize(
    ("timing", "phase"),
    [
        (RequestTiming(arrival=1.0), "queued"),
        (RequestTiming(arrival=1.0, scheduled=2.0), "prefill"),
        (RequestTiming(arrival=1.0, scheduled=2.0, first_token=3.0, last_token=3.0), "decode"),
    ],
)
def test_aborts_count_by_phase_and_observe_only_what_happened(timing: RequestTiming, phase: str) -> None:
    metrics = make()
    timing.finish_reason, timing.finished = "abort", 4.0
    metrics.on_finish(timing)
    values = samples(metrics)
    assert values[f"eft:aborts_total{{phase={phase}}}"] == 1
    assert values["eft:e2e_request_latency_seconds_count"] == 1
    assert values["eft:request_queue_time_seconds_count"] == (phase != "queued")
    assert values["eft:request_decode_time_seconds_count"] == (phase == "decode")


def test_gauges_are_those_of_all_engines_together() -> None:
    """As while a server moves to another model: two engines have each their own requests, blocks and adapters."""
    metrics = make()
    old, new = (
        metrics.open_engine(SHAPE),
        metrics.open_engine(CacheShape(max_model_len=64, block_size=8, num_blocks=24)),
    )
    first = EngineLoad(running=3, waiting=2, deferred=1, used_blocks=8, swapped_blocks=2)
    second = EngineLoad(running=2, waiting=4, used_blocks=8)

    def at_work(engine: EngineGauges, adapter: str) -> None:
        engine.on_adapter_step(running={adapter}, active={adapter})

    def shown(*names: str) -> list[float]:
        values = samples(metrics)
        return [values[f"eft:{name}"] for name in names]

    gauges = (
        "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason{reason=capacity}",
        "num_requests_waiting_by_reason{reason=deferred}", "kv_cache_usage_perc", "swap_used_bytes",
        "swap_capacity_bytes",
    )  # fmt: skip
    for engine, load, adapter in ((new, second, "b@1:x"), (old, first, "a@1:x")):
        engine.on_step(load)
        at_work(engine, adapter)
    assert shown(*gauges) == [5, 6, 5, 1, 0.5, 2000, 6000]
    assert (metrics.load.running, metrics.kv_usage) == (5, 0.5)
    [info] = [name for name in samples(metrics) if name.startswith("eft:lora_requests_info")]
    assert "running_lora_adapters=a,b" in info
    shapes = [name for name in samples(metrics) if name.startswith("eft:cache_config_info")]
    assert shapes == ["eft:cache_config_info{block_size=8,max_model_len=64,num_gpu_blocks=24}"]

    new.close()  # as after a move that failed
    assert shown(*gauges) == [3, 2, 1, 1, 1.0, 2000, 6000]
    shapes = [name for name in samples(metrics) if name.startswith("eft:cache_config_info")]
    assert shapes == ["eft:cache_config_info{block_size=16,max_model_len=512,num_gpu_blocks=8}"]
    [info] = [name for name in samples(metrics) if name.startswith("eft:lora_requests_info")]
    assert "running_lora_adapters=a," in info
    new.close()
    old.close()
    assert shown("num_requests_running", "kv_cache_usage_perc") == [0, 0]


def test_an_idle_step_is_no_iteration() -> None:
    metrics = make()
    metrics.open_engine(SHAPE).on_step(EngineLoad())
    assert samples(metrics)["eft:iteration_tokens_total_count"] == 0


def test_the_tokens_of_an_iteration_are_those_of_vllm() -> None:
    """What a step generated, and what was computed of each prompt that it completed (not what it computed itself)."""
    metrics = make()
    engine = metrics.open_engine(SHAPE)

    def step() -> list[float]:
        before = samples(metrics)["eft:iteration_tokens_total_sum"]
        engine.on_step(EngineLoad(running=1))
        values = samples(metrics)
        return [values["eft:iteration_tokens_total_count"], values["eft:iteration_tokens_total_sum"] - before]

    long = RequestTiming(arrival=1.0, prompt_tokens=700, cached_tokens=100)
    short = RequestTiming(arrival=1.0, prompt_tokens=5, first_token=2.0, last_token=2.0)
    metrics.on_tokens(short, 1, 3.0)  # beside a part of the long prompt
    assert step() == [1, 1]
    assert step() == [1, 0]  # another part of it, and nothing was generated
    metrics.on_tokens(long, 1, 4.0)
    metrics.on_tokens(short, 3, 4.0)  # two drafts were right
    assert step() == [2, 600 + 1 + 3]


def test_an_engines_iterations_add_up_to_its_tokens(tiny_model: Path) -> None:
    from runtime import LLM, SamplingParams

    llm = LLM(str(tiny_model), num_blocks=64, max_batched_tokens=16)
    prompts = [[5, 6, 7] * 20, [9, 10]]
    llm.generate(prompts, SamplingParams(max_tokens=6, ignore_eos=True))
    values = samples(llm.engine.metrics)
    computed = sum(map(len, prompts)) - values["eft:prompt_tokens_cached_total"]
    assert values["eft:iteration_tokens_total_sum"] == computed + values["eft:generation_tokens_total"] == 62 + 12


def test_token_buckets_go_up_to_the_context() -> None:
    names = [name for name in samples(make()) if name.startswith("eft:request_prompt_tokens_bucket")]
    bounds = [name.partition("le=")[2].rstrip("}") for name in names]
    assert [float(bound) for bound in bounds[:-1]] == [1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert bounds[-1] == "+Inf"


def test_labels_from_clients_are_bounded() -> None:
    metrics = make()
    for index in range(50):
        metrics.on_http(f"VERB{index}", 404, UNMATCHED, 0.0)
        metrics.on_rejection(f"reason {index}")
    values = samples(metrics)
    assert values["eft:http_requests_total{handler=unmatched,method=OTHER,status=404}"] == 50
    assert values["eft:admission_rejections_total{reason=other}"] == 50
    assert len([name for name in values if name.startswith("eft:http_requests_total")]) == 1


def test_gpus_are_there_where_there_are_some() -> None:
    assert not [name for name in samples(make()) if name.startswith("eft:gpu")]
    metrics = make()
    metrics.on_gpus([GpuUsage(index=index, used=30, total=100, busy=None if index else 0.25) for index in range(2)])
    found = {name: value for name, value in samples(metrics).items() if name.startswith("eft:gpu")}
    assert found == {
        "eft:gpu_utilization{gpu=0}": 0.25,
        "eft:gpu_memory_used_bytes{gpu=0}": 30.0,
        "eft:gpu_memory_used_bytes{gpu=1}": 30.0,
        "eft:gpu_memory_total_bytes{gpu=0}": 100.0,
        "eft:gpu_memory_total_bytes{gpu=1}": 100.0,
    }


class FakeCuda:
    """Two GPUs behind torch.cuda; this process has tensors on the second one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, missing: Exception | None) -> None:
        def ask(value: Callable[[int], int]) -> Callable[[int], int]:
            def answer(index: int) -> int:
                if missing is not None:
                    raise missing
                return value(index)

            return answer

        fakes = {
            "is_available": lambda: True,
            "device_count": lambda: 2,
            "get_device_properties": lambda index: SimpleNamespace(name="GPU", total_memory=100),
            "device_memory_used": ask(lambda index: 10 + index),
            "utilization": ask(lambda index: 50 + index),
            "memory_reserved": lambda index: index,
            "mem_get_info": lambda index: (60, 100),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_use_of_gpus_comes_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch, None)
    assert gpu_usage() == [
        GpuUsage(index=0, used=10, total=100, busy=0.5),
        GpuUsage(index=1, used=11, total=100, busy=0.51),
    ]


@pytest.mark.parametrize("missing", [ModuleNotFoundError("No module named pynvml"), RuntimeError("NVML is not there")])
def test_without_the_driver_no_gpu_gets_a_context(monkeypatch: pytest.MonkeyPatch, missing: Exception) -> None:
    FakeCuda(monkeypatch, missing)
    assert gpu_usage() == [GpuUsage(index=1, used=40, total=100, busy=None)]


def test_openmetrics_parses() -> None:
    text, media_type = busy().render("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    families = {family.name: family.type for family in parse_openmetrics(text.decode())}
    assert families["eft:generation_tokens"] == "counter"
    assert families["eft:time_to_first_token_seconds"] == "histogram"


def test_both_forms_have_the_same_samples() -> None:
    """The client library escapes colons in the names of OpenMetrics' samples, unless it is told not to."""
    metrics = busy()
    plain = {sample.name for family in parse(metrics.render()[0].decode()) for sample in family.samples}
    text = metrics.render("application/openmetrics-text")[0].decode()
    assert {sample.name for family in parse_openmetrics(text) for sample in family.samples} == plain


def test_the_process_can_be_scraped_without_a_model() -> None:
    names = {family.name for family in parse(render_process()[0].decode())}
    assert {"process_resident_memory_bytes", "eft:process_resident_memory_bytes"} <= names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_the_exposition() -> None:
    """Clean but for two complaints about names, which are vLLM's and which its dashboards need."""
    done = subprocess.run(["promtool", "check", "metrics"], input=busy().render()[0], capture_output=True, check=False)
    complaints = [line.partition(" ") for line in done.stderr.decode().splitlines()]
    wrong = [
        (name, complaint)
        for name, _, complaint in complaints
        if complaint != "metric names should not contain ':'" and not name.endswith(":iteration_tokens_total")
    ]
    assert wrong == []
    assert done.returncode in (0, 3)  # 1: it could not be parsed; 3: the complaints above
