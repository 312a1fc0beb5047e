"""Measuring which experts a model uses on which domain, and the report of it."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modmoe.models import ModMoEModel
from modmoe.surgery.domains import Specialisation, specialisation
from modmoe.surgery.fingerprint import checkpoint_fingerprint, difference
from modmoe.surgery.routed_modules import RoutedModule, find_routed_modules, observing
from modmoe.surgery.routing_sums import RoutingSums

FORMAT = "modmoe-usage"
VERSION = 1

# What the base model of a batch is given; the rest (labels) is for a head.
_INPUTS = ("input_ids", "attention_mask", "position_ids")

METRICS: dict[str, Callable[[RoutingSums], Tensor]] = {
    "frequency": lambda sums: sums.load,
    "gate": lambda sums: sums.mean_gate,
    "reap": lambda sums: sums.reap,
}
"""Name -> score of each expert (E,), the higher the more worth keeping: share of the (token, expert) pairs; mean gate
over all tokens; mean of gate * norm of output over the tokens that chose the expert (arXiv:2510.13999)."""


@dataclass(frozen=True, eq=False)
class RouterUsage:
    """One router of the model on all domains."""

    layer: int
    side: str
    """"attn" or "ffn"."""
    name: str
    """Dotted name of the module that holds the router and its experts."""
    top_k: int
    sums: dict[str, RoutingSums]
    """By domain."""

    @property
    def num_experts(self) -> int:
        return next(iter(self.sums.values())).num_experts

    def on(self, domain: str | None = None) -> RoutingSums:
        """Sums of one domain; of all tokens together if None."""
        return reduce(add, self.sums.values()) if domain is None else self.sums[domain]

    @property
    def specialisation(self) -> Specialisation:
        """Domains in the order of `sums`."""
        return specialisation([sums.load for sums in self.sums.values()])


@dataclass(frozen=True, eq=False)
class UsageReport:
    """Which experts of a model were used on which domain."""

    routers: list[RouterUsage]
    """Layer by layer, attention before FFN."""
    dead_below: float = 0.01
    """An expert is dead if its load is below this times the even load 1 / E."""
    model: dict[str, Any] | None = None
    """`checkpoint_identity` of the measured checkpoint; None for a model that was in memory only."""
    arguments: dict[str, Any] | None = None
    """How the measurement was called, JSON-serialisable."""

    @property
    def domains(self) -> list[str]:
        return list(self.routers[0].sums)

    @property
    def tokens(self) -> dict[str, int]:
        """Routed tokens of each domain."""
        return {name: int(sums.tokens) for name, sums in self.routers[0].sums.items()}

    def router(self, layer: int, side: str) -> RouterUsage:
        """
        Raises:
            ValueError: if there is no such router.
        """
        for router in self.routers:
            if (router.layer, router.side) == (layer, side):
                return router
        known = ", ".join(f"{router.side} of layer {router.layer}" for router in self.routers)
        raise ValueError(f"the usage report has no {side!r} router of layer {layer}; it has {known}")

    def scores(self, metric: str, domain: str | None = None, *, layer: int, side: str) -> Tensor:
        """
        How much each expert is worth keeping.

        Args:
            metric: "frequency", "gate" or "reap"; see `METRICS`.
            domain: one of `domains`; None is all measured tokens together, each counted once.
            layer: number of the block.
            side: "attn" or "ffn".

        Returns:
            (E,) float64; 0 for an expert that no token chose.

        Raises:
            ValueError: unknown metric, domain or router; names what there is.
        """
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
        self.check_domain(domain)
        return METRICS[metric](self.router(layer, side).on(domain))

    def check_domain(self, domain: str | None) -> None:
        """
        Raises:
            ValueError: if the domain was not measured; None is all together.
        """
        if domain is not None and domain not in self.domains:
            raise ValueError(f"the usage report has no domain {domain!r}; it has {', '.join(self.domains)}")

    def check_model(self, directory: Path) -> None:
        """
        Raises:
            ValueError: if the report was made on another model than the checkpoint in `directory`, or on none on disk.
            FileNotFoundError: no checkpoint there.
        """
        if self.model is None:
            raise ValueError("the usage report names no checkpoint: make it with tools/expert_report.py --model DIR")
        what = difference(self.model["fingerprint"], checkpoint_fingerprint(directory))
        if what is not None:
            raise ValueError(
                f"the usage report is of another model ({self.model['path']}) than {directory}: {what}; make one of "
                f"this model with tools/expert_report.py --model {directory}"
            )

    def save(self, path: Path) -> None:
        """Write JSON: the sums, which `load` reads back bit for bit, and for readers what follows from them."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "arguments": self.arguments,
            "dead_below": self.dead_below,
            "tokens": self.tokens,
            "routers": [self._router_json(router) for router in self.routers],
        }
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, path)

    def _router_json(self, router: RouterUsage) -> dict[str, Any]:
        special = router.specialisation
        figures = {domain: self._figures(router.on(domain)) for domain in (None, *self.domains)}
        return {
            "layer": router.layer,
            "side": router.side,
            "name": router.name,
            "num_experts": router.num_experts,
            "top_k": router.top_k,
            "domain_mutual_information": special.mutual_information,
            "domain_mutual_information_by_expert": special.contributions.tolist(),
            "specialisation": special.strengths.tolist(),
            "all_domains": figures.pop(None),
            "domains": {
                domain: {**figures[cast(str, domain)], "sums": router.sums[domain].to_json()}
                for domain in self.domains
            },
        }

    def _figures(self, sums: RoutingSums) -> dict[str, Any]:
        return {
            "load": sums.load.tolist(),
            "mean_gate": sums.mean_gate.tolist(),
            "mean_gate_if_chosen": sums.mean_gate_if_chosen.tolist(),
            "mean_output_norm": sums.mean_output_norm.tolist(),
            "reap": sums.reap.tolist(),
            "max_violation": sums.max_violation,
            "dead_experts": sums.dead(self.dead_below).nonzero().flatten().tolist(),
            "entropy_of_a_token": sums.token_entropy,
            "entropy_of_the_mean": sums.mean_entropy,
            "mutual_information": sums.mutual_information,
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """
        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, a newer format, or a damaged one.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no usage report at {path}: make one with tools/expert_report.py")
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not a usage report ({error}): make one with tools/expert_report.py") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is JSON but not a usage report: give usage.json of tools/expert_report.py")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path} has version {content.get('version')!r} of the format, this modmoe reads {VERSION}: make the "
                "report again with tools/expert_report.py"
            )
        try:
            routers = [_router_from_json(router) for router in content["routers"]]
            return cls(routers, content["dead_below"], content["model"], content["arguments"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): make the report again") from error


def _router_from_json(content: dict[str, Any]) -> RouterUsage:
    sums = {name: RoutingSums.from_json(domain["sums"]) for name, domain in content["domains"].items()}
    return RouterUsage(content["layer"], content["side"], content["name"], content["top_k"], sums)


def measure_usage(
    model: PreTrainedModel,
    batches_by_domain: Mapping[str, Iterable[Mapping[str, Tensor]]],
    *,
    dead_below: float = 0.01,
    identity: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
) -> UsageReport:
    """
    One pass over the batches of each domain. Memory does not grow with their number.

    Padding (`attention_mask` 0) counts for nothing, except in a native model that routes it (`route_padding`); every
    other token counts, special ones included.

    Args:
        model: with routed experts; see `find_routed_modules`. Left in the mode it was in.
        batches_by_domain: batches with `input_ids` (B, T) and, if wanted, `attention_mask` and `position_ids`.
        dead_below: see `UsageReport`.
        identity: `checkpoint_identity` of the directory that the model was loaded from, by which
            `UsageReport.check_model` knows it again.
        arguments: to be kept in the report.

    Raises:
        ValueError: no domain, a domain without tokens, or a model without routed experts.
    """
    if not batches_by_domain:
        raise ValueError("give at least one domain of text, got none")
    modules = find_routed_modules(model)
    was_training = model.training
    model.eval()
    try:
        measured = {name: _measure(name, model, modules, batches) for name, batches in batches_by_domain.items()}
    finally:
        model.train(was_training)
    top_k = next(iter(measured.values())).top_k
    routers = [
        RouterUsage(m.layer, m.side, m.name, top_k[i], {name: domain.sums[i] for name, domain in measured.items()})
        for i, m in enumerate(modules)
    ]
    return UsageReport(routers, dead_below, identity, arguments)


class _Measured(NamedTuple):
    """One domain, by number of the routed module."""

    sums: dict[int, RoutingSums]
    top_k: dict[int, int]


@torch.no_grad()
def _measure(
    domain: str, model: PreTrainedModel, modules: list[RoutedModule], batches: Iterable[Mapping[str, Tensor]]
) -> _Measured:
    base = model.base_model
    measured = _Measured({}, {})
    token_mask: Tensor | None = None

    def observe(number: int, logits: Tensor, index: Tensor, gates: Tensor, norms: Tensor) -> None:
        mask = None if token_mask is None else token_mask.to(logits.device)
        sums = RoutingSums.of(logits, index, gates, norms, mask)
        # Sums stay on the device, so that nothing waits for it before the end.
        measured.sums[number] = measured.sums[number] + sums if number in measured.sums else sums
        measured.top_k[number] = index.shape[-1]

    with observing(modules, observe):
        for batch in batches:
            inputs = {name: batch[name].to(model.device) for name in _INPUTS if name in batch}
            token_mask = _token_mask(base, inputs)
            base(**inputs, use_cache=False)
    if not measured.sums or not all(sums.tokens for sums in measured.sums.values()):
        raise ValueError(f"domain {domain!r} has no tokens: give it text")
    return _Measured({number: sums.cpu() for number, sums in measured.sums.items()}, measured.top_k)


def _token_mask(base: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """(N,) bool, the tokens that count; None is all."""
    attention_mask = inputs.get("attention_mask")
    if isinstance(base, ModMoEModel):
        return base.token_mask(attention_mask, inputs["input_ids"].shape[1])
    return None if attention_mask is None else attention_mask.flatten().bool()
