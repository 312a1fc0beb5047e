"""Working on trained models: which experts do what; adding experts, and shipping what was added."""

from modmoe.surgery.extend import add_extension, train_only
from modmoe.surgery.pack import apply_packs, create_pack, merge_common, remove_extension
from modmoe.surgery.usage import METRICS, RouterUsage, UsageReport, measure_usage

__all__ = [
    "METRICS",
    "RouterUsage",
    "UsageReport",
    "add_extension",
    "apply_packs",
    "create_pack",
    "measure_usage",
    "merge_common",
    "remove_extension",
    "train_only",
]
