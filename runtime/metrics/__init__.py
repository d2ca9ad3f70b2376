"""Every metric, defined once: `table` defines them, `Metrics` takes observations, `exposition` answers a scrape."""

from runtime.metrics.exposition import AdapterTraffic, Totals, quantile, render_process
from runtime.metrics.recorder import PUBLISH_OUTCOMES, UNMATCHED, CacheShape, EngineGauges, EngineLoad, Metrics
from runtime.metrics.table import ADAPTER, TABLE, Spec

__all__ = [
    "ADAPTER",
    "PUBLISH_OUTCOMES",
    "TABLE",
    "UNMATCHED",
    "AdapterTraffic",
    "CacheShape",
    "EngineGauges",
    "EngineLoad",
    "Metrics",
    "Spec",
    "Totals",
    "quantile",
    "render_process",
]
