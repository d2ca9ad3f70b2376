"""Sums and buckets of the metrics at one moment, for rates and quantiles over the time between two moments."""

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Struct
from prometheus_client import Counter, Histogram


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
