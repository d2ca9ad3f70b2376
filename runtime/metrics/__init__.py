"""Every metric, defined once: `table` defines them, `Metrics` takes observations, `exposition` answers a scrape."""

from runtime.metrics.exposition import render_process
from runtime.metrics.recorder import PUBLISH_OUTCOMES, UNMATCHED, Metrics
from runtime.metrics.table import ADAPTER, TABLE, Spec
from runtime.metrics.totals import AdapterTraffic, Totals, quantile

__all__ = [
    "ADAPTER",
    "PUBLISH_OUTCOMES",
    "TABLE",
    "UNMATCHED",
    "AdapterTraffic",
    "Metrics",
    "Spec",
    "Totals",
    "quantile",
    "render_process",
]
