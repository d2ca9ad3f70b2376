"""Answer to a scrape: the metric families, with the names and labels that are added at the scrape."""

from collections.abc import Iterable, Iterator

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
