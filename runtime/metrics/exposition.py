"""Answer to a scrape: the metric families, with the names and labels that are added at the scrape."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from msgspec import Struct
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from runtime.metrics.table import TABLE

Families = dict[str, Gauge | Counter | Histogram]


def render_process(accept: str = "") -> tuple[bytes, str]:
    """Metrics while no model is loaded: the process's own."""
    registry = CollectorRegistry()
    registry.register(ProcessNames(True))
    return render(registry, accept)


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The exposition and its content type: OpenMetrics where `accept` requests it, else plain text."""
    if "application/openmetrics-text" in accept:
        # Otherwise the client library writes `eft_…` for `eft:…`.
        text: bytes = openmetrics.generate_latest(registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
        return text, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


class NamesCollector(Collector):
    """Collects the table's families under their names and labels."""

    def __init__(self, families: Families, labels: dict[str, str], twins: bool) -> None:
        self._families = families
        self._labels = labels
        self._twins = twins

    def collect(self) -> Iterator[Metric]:
        for spec in TABLE:
            family = next(iter(self._families[spec.name].collect()))
            model = {} if spec.twin == "plain" else self._labels
            yield _renamed(family, "eft:", model)
            if self._twins and spec.twin == "vllm":
                yield _renamed(family, "vllm:", {**model, "engine": "0"})
            elif self._twins and spec.twin == "plain":
                yield _renamed(family, "", {})


class ProcessNames(Collector):
    """CPU, memory and file descriptors of this process, as `eft:process_…` and as plain `process_…`."""

    def __init__(self, twins: bool) -> None:
        self._process = ProcessCollector(registry=None)
        self._twins = twins

    def collect(self) -> Iterator[Metric]:
        for family in self._process.collect():
            yield _renamed(family, "eft:", {})
            if self._twins:
                yield _renamed(family, "", {})

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing to read /proc for when registering


def _renamed(family: Metric, prefix: str, labels: dict[str, str]) -> Metric:
    twin = Metric(prefix + family.name, family.documentation, family.type)
    twin.samples = [
        Sample(prefix + sample.name, {**sample.labels, **labels}, sample.value)
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    return twin


# -- totals ----------------------------------------------------------------------------------------
#
# Sums and buckets of the metrics at one moment, for rates and quantiles over the time between two moments.


@dataclass(frozen=True)
class Totals:
    """Sums and histograms of the families without labels, at `time`."""

    time: float
    """Seconds since the epoch."""
    sums: Mapping[str, float]
    """Counter's value, or histogram's sum, by name."""
    buckets: Mapping[str, Mapping[float, float]]
    """Histogram's name → bucket's border → observations up to it."""

    def rate(self, name: str, before: "Totals") -> float:
        """Increase a second since `before`; 0 where no time has passed."""
        seconds = self.time - before.time
        return max(0.0, self.sums[name] - before.sums[name]) / seconds if seconds > 0 else 0.0


class AdapterTraffic(Struct, frozen=True, kw_only=True):
    """Requests to one version of an adapter that ended since it was loaded."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    first_token_p50: float | None
    """Seconds from arrival to the first token; null without a request."""
    first_token_p95: float | None


def traffic_of(requests: Counter, prompt: Counter, generated: Counter, first_token: Histogram) -> AdapterTraffic:
    """The traffic that the samples of one version show."""
    samples = _samples(first_token)
    buckets = {float(border): value for (suffix, border), value in samples.items() if suffix == "_bucket"}
    return AdapterTraffic(
        requests=int(_samples(requests)["_total", ""]),
        prompt_tokens=int(_samples(prompt)["_total", ""]),
        generated_tokens=int(_samples(generated)["_total", ""]),
        first_token_p50=quantile(buckets, 0.5),
        first_token_p95=quantile(buckets, 0.95),
    )


def totals_of(time: float, counters: Mapping[str, Counter], histograms: Mapping[str, Histogram]) -> Totals:
    """The totals of families without labels, by name."""
    sums = {name: _samples(counter)["_total", ""] for name, counter in counters.items()}
    buckets = {}
    for name, histogram in histograms.items():
        samples = _samples(histogram)
        sums[name] = samples["_sum", ""]
        buckets[name] = {float(border): value for (suffix, border), value in samples.items() if suffix == "_bucket"}
    return Totals(time, sums, buckets)


def _samples(family: Counter | Histogram) -> dict[tuple[str, str], float]:
    """(suffix of the sample's name, its bucket's border) → value."""
    found = next(iter(family.collect()))
    return {
        (sample.name.removeprefix(found.name), sample.labels.get("le", "")): sample.value for sample in found.samples
    }


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Quantile of the observations in cumulative buckets, evenly spread in each, as Prometheus has it.

    None without observations; the highest finite border for what lies above it.
    """
    total = max(buckets.values(), default=0.0)
    if not total:
        return None
    wanted, low, below = share * total, 0.0, 0.0
    for border, count in sorted(buckets.items()):
        if count >= wanted:
            return low if border == float("inf") else low + (border - low) * (wanted - below) / max(count - below, 1e-9)
        low, below = border, count
    return low
