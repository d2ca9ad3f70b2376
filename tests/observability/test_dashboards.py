"""The dashboards: well formed, and each of their expressions has data after a short load; vLLM's too."""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.api.conftest import RunningServer
from tests.browser.chromium import serving
from tests.observability.prometheus import PROMETHEUS, WINDOW, Prometheus, dashboards, expressions, prometheus

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None,
    reason="there is no prometheus (Debian: sudo apt-get install prometheus; `make test` fetches it)",
)

RECIPE = """name: newts
adapter: lora
lora_r: 4
lora_target_linear: true
datasets:
  - path: train.jsonl
    type: auto
test_datasets:
  - path: test.jsonl
    type: auto
eval_steps: 2
micro_batch_size: 2
max_steps: 4
learning_rate: 1e-3
"""
ROWS = "\n".join(
    json.dumps({"messages": [{"role": "user", "content": f"Newt {n}?"}, {"role": "assistant", "content": f"Eft {n}."}]})
    for n in range(6)
)
MATCH = 'job=~"eft", model_name=~".+", instance=~".+", engine=~".+"'

# Names that vLLM's dashboards ask for (examples/observability/ of its repository).
GAUGES = [
    "num_requests_running", "num_requests_waiting", "num_requests_waiting_by_reason", "kv_cache_usage_perc",
    "cache_config_info", "lora_requests_info", "engine_sleep_state",
]  # fmt: skip
COUNTERS = [
    "prompt_tokens", "generation_tokens", "prompt_tokens_cached", "num_preemptions", "request_success",
    "prefix_cache_queries", "prefix_cache_hits", "spec_decode_num_drafts", "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
]  # fmt: skip
HISTOGRAMS = [
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_inference_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "time_to_first_token_seconds",
    "inter_token_latency_seconds", "request_time_per_output_token_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_max_num_generation_tokens", "request_params_max_tokens",
    "request_params_n", "iteration_tokens_total",
]  # fmt: skip
PLAIN = ["http_requests_total", "process_resident_memory_bytes", "process_cpu_seconds_total"]


def vllm_expressions() -> Iterator[str]:
    """Each name in the forms in which vLLM's panels have it."""
    for name in GAUGES:
        yield f"sum by (instance, engine) (vllm:{name}{{{MATCH}}})"
    for name in COUNTERS:
        yield f"sum by (instance, engine) (rate(vllm:{name}_total{{{MATCH}}}[{WINDOW}]))"
    for name in HISTOGRAMS:
        series = f"vllm:{name}"
        yield f"histogram_quantile(0.99, sum by (le) (rate({series}_bucket{{{MATCH}}}[{WINDOW}])))"
        yield f"rate({series}_sum{{{MATCH}}}[{WINDOW}]) / rate({series}_count{{{MATCH}}}[{WINDOW}])"
        yield f"sum by (le) (increase({series}_bucket{{{MATCH}}}[1m]))"
    yield from (f'{name}{{job="eft"}}' for name in PLAIN)
    yield f'max(vllm:engine_sleep_state{{{MATCH}, sleep_state="awake"}}) == 1'
    yield f'sum(rate(vllm:request_success_total{{{MATCH}, finished_reason="length"}}[{WINDOW}])) > 0'


class Load:
    """Requests to the base model and an adapter, and a job."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=60, trust_env=False)

    def train(self) -> None:
        form = {
            "recipe": ("recipe.yaml", RECIPE),
            "train.jsonl": ("train.jsonl", ROWS),
            "test.jsonl": ("test.jsonl", ROWS),
        }
        job = self._http.post("/admin/train", files=form)
        assert job.status_code in (201, 202), job.text
        end = time.monotonic() + 60
        while (state := self._http.get(f"/admin/jobs/{job.json()['id']}").json())["status"] != "succeeded":
            assert state["status"] not in ("failed", "cancelled"), state["error"]
            assert time.monotonic() < end
            time.sleep(0.1)

    def ask(self, model: str | None = None) -> None:
        body: dict[str, Any] = {"prompt": "The newt is a small " * 4, "max_tokens": 12, "model": model}
        assert self._http.post("/v1/completions", json=body).status_code == 200
        with self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            answer.read()

    def close(self) -> None:
        self._http.close()


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(tiny_model, tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture(scope="module")
def loaded(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, after a job and requests over some scrapes."""
    load = Load(server.url)
    with prometheus(tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://")) as found:
        found.until('up{job="eft"} == 1')
        load.train()
        for _ in range(6):
            load.ask()
            load.ask("newts")
            time.sleep(0.3)
        found.until("eft_slo:errors:ratio_rate6h")
        yield found
    load.close()


def test_dashboards_are_well_formed() -> None:
    found = dashboards()
    assert len(found) == 4
    assert len({one["uid"] for one in found.values()}) == 4
    for name, one in found.items():
        ids = [panel["id"] for panel in one["panels"]]
        assert len(set(ids)) == len(ids), name
        assert [variable["name"] for variable in one["templating"]["list"]] == ["datasource", "model_name", "instance"]
        for panel in one["panels"]:
            assert panel["title"], name
            assert panel["description"], (name, panel["title"])
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    for name, one in dashboards().items():
        taken: set[tuple[int, int]] = set()
        for place in (panel["gridPos"] for panel in one["panels"]):
            cells = set(
                itertools.product(
                    range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
                )
            )
            assert place["x"] + place["w"] <= 24, name
            assert not cells & taken, (name, place)
            taken |= cells


@needs_prometheus
@pytest.mark.parametrize("name", sorted(dashboards()))
def test_every_expression_has_data(loaded: Prometheus, name: str) -> None:
    empty = [(title, text) for title, text in expressions(dashboards()[name]) if not loaded.ask(text)]
    assert empty == []


@needs_prometheus
def test_every_expression_of_vllms_dashboards_has_data(loaded: Prometheus) -> None:
    assert [text for text in vllm_expressions() if not loaded.ask(text)] == []


@needs_prometheus
def test_numbers_are_those_of_the_load(loaded: Prometheus) -> None:
    (adapter,) = loaded.ask('sum by (adapter, version) (eft:adapter_requests_total{adapter="newts"})')
    assert adapter["metric"] == {"adapter": "newts", "version": "1"}
    assert float(loaded.ask("eft:adapter_publishes_total{outcome='published'}")[0]["value"][1]) == 1
    assert float(loaded.ask("sum(eft:jobs{state='succeeded'})")[0]["value"][1]) == 1
    assert float(loaded.ask("eft_slo:errors:ratio_rate5m")[0]["value"][1]) == 0
    assert loaded.ask("ALERTS{alertstate='firing'}") == []


@needs_prometheus
def test_autoscaling_gets_one_number_of_each_query(loaded: Prometheus) -> None:
    """KEDA takes a vector of one element, and no NaN: without requests there must be a number, too."""
    path = Path(__file__).parents[2] / "settings" / "deploy" / "kubernetes" / "autoscaling.yaml"
    (scaled,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    for trigger in scaled["spec"]["triggers"]:
        query = trigger["metadata"]["query"]
        for asked in (query, query.replace("[2m]", f"[{WINDOW}]"), query.replace("[2m]", "[2m] offset 1h")):
            (found,) = loaded.until(asked)
            assert 0 <= float(found["value"][1]) < float(trigger["metadata"]["threshold"])
