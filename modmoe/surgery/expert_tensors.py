"""The experts of a saved model: which tensors, and which rows of them, belong to whom.

Letters: E experts of a pool, R rows of its router: E, and those of pruned experts that stay in the softmax.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from transformers import AutoConfig, PreTrainedConfig

from modmoe.models import ModMoEConfig
from modmoe.models.safetensors_stream import SavedWeights
from modmoe.surgery.model_directory import read_config
from modmoe.surgery.prune_plan import Place

# Models of transformers whose experts can be removed. Expert by expert on the disk, FFN experts alone.
FOREIGN_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")

_SIDES = {"self_attn": "attn", "mlp": "ffn", "block_sparse_moe": "ffn"}
_NAME = re.compile(
    r"(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<side>self_attn|mlp|block_sparse_moe))"
    r"\.(?P<part>gate|experts)\.(?:(?P<expert>\d+)\.)?(?P<rest>.+)"
)


class PoolTensor(NamedTuple):
    """A tensor of a router or of its experts."""

    name: str
    expert: int | None
    """The one that it belongs to; None: its rows belong to one each."""
    rest: str
    """What follows the module's name and, where there is one, the expert's number."""


@dataclass
class ExpertPool:
    """A router and its experts, on the disk."""

    module: str
    """Dotted name of what holds both."""
    num_experts: int
    top_k: int
    rows: list[int] = field(default_factory=list)
    """(E,) ascending: the router's row of each expert."""
    num_rows: int = 0
    """R."""
    router: list[PoolTensor] = field(default_factory=list)
    experts: list[PoolTensor] = field(default_factory=list)


class ExpertCheckpoint:
    """
    A directory with a native model, or a transformers one of `FOREIGN_TYPES`. Nothing large is read.

    Attributes:
        directory: where it is.
        fields: of config.json.
        config: what they say.
        weights: the tensors, read when they are asked for.
        pools: layer by layer, attention before FFN; dense layers are left out.

    Raises:
        FileNotFoundError: no such directory, no config.json, no safetensors, or one of several missing.
        ValueError: damaged files, or a model without experts that this package can remove.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fields = read_config(directory)
        kind = self.fields.get("model_type")
        if kind == "moduleformer":
            raise ValueError(
                f"{directory} is in IBM's format: make it a native model with tools/convert_moduleformer.py first"
            )
        if kind != ModMoEConfig.model_type and kind not in FOREIGN_TYPES:
            raise ValueError(
                f"model type {kind!r} of {directory} has no experts that can be removed: give a native model "
                f"({ModMoEConfig.model_type}), or one of {', '.join(FOREIGN_TYPES)}"
            )
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
        self.weights = SavedWeights(directory)
        self.pools = self._find_pools()
        if not self.pools:
            raise ValueError(f"every layer of the model in {directory} is dense: there are no experts to remove")

    @property
    def is_native(self) -> bool:
        return isinstance(self.config, ModMoEConfig)

    def _find_pools(self) -> dict[Place, ExpertPool]:
        found: dict[Place, ExpertPool] = {}
        matches = [match for name in self.weights if (match := _NAME.fullmatch(name))]
        routed = {match["module"] for match in matches if match["part"] == "gate"}
        for match in matches:
            if match["module"] not in routed:
                continue
            place = (int(match["layer"]), _SIDES[match["side"]])
            pool = found.setdefault(place, ExpertPool(match["module"], *self._counts(place)))
            tensor = PoolTensor(match[0], None if match["expert"] is None else int(match["expert"]), match["rest"])
            (pool.router if match["part"] == "gate" else pool.experts).append(tensor)
        for pool in found.values():
            self._read_rows(pool)
        return dict(sorted(found.items()))

    def _counts(self, place: Place) -> tuple[int, int]:
        """Experts and top-k, as the config says."""
        layer, side = place
        if isinstance(self.config, ModMoEConfig):
            return self.config.attn_experts_at(layer) if side == "attn" else self.config.experts_at(layer)
        name = "num_local_experts" if "num_local_experts" in self.fields else "num_experts"
        return getattr(self.config, name), self.config.num_experts_per_tok

    def _read_rows(self, pool: ExpertPool) -> None:
        """Fill in which row is whose, and check that the weights are those of the config."""
        shapes = {tensor.rest: self.weights.spec(tensor.name).shape for tensor in pool.router}
        pool.num_rows = shapes["weight"][0] if "weight" in shapes else 0
        pool.rows = list(range(pool.num_rows))
        if "expert_rows" in shapes:
            pool.rows = self.weights[f"{pool.module}.gate.expert_rows"].tolist()
        single = {tensor.expert for tensor in pool.experts if tensor.expert is not None}
        stacked = {self.weights.spec(tensor.name).shape[0] for tensor in pool.experts if tensor.expert is None}
        counts = {len(pool.rows), *stacked} | ({len(single)} if single else set())
        if not pool.experts or counts != {pool.num_experts} or single - set(range(pool.num_experts)):
            raise ValueError(
                f"the weights in {self.directory} do not match the config, which says {pool.num_experts} experts in "
                f"{pool.module}: copy or save the checkpoint again"
            )
