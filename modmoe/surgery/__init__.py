"""Working on trained models: which experts do what."""

from modmoe.surgery.usage import METRICS, RouterUsage, UsageReport, measure_usage

__all__ = ["METRICS", "RouterUsage", "UsageReport", "measure_usage"]
