"""Blocks of the student that start with the weights of the dense teacher's blocks.

A student of the teacher's width takes weights as they are. A narrower one sees hidden states through the projection P
of its stitches (see `stitch`). After an RMSNorm with weight g a matrix W reads W (g * h) sqrt(Ht) / ||h||; for
h = P x that is W diag(g) P sqrt(Ht / Hs) after a norm of the student's width without weight. What a block adds to the
hidden states comes back through P^T. Through a LayerNorm, which subtracts a mean over the teacher's width, no such
matrix leads.

Letters: Ht, Hs widths of teacher and student, E experts, I intermediate size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from modmoe.distill.seeds import stage_seed
from modmoe.distill.stages import Stage
from modmoe.distill.student import StudentStage, initialize_blocks
from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.dense import FAMILIES, config_from_dense
from modmoe.surgery.upcycle_ffn import upcycle_ffn

_FFN, _ATTENTION, _ROUTER = "mlp.experts.", "self_attn.", "self_attn.gate."
_FIRST_BLOCK = ".0."
_READ_NORMED = {
    "self_attn.experts.q_proj.weight": "input_layernorm.weight",
    "self_attn.k_proj.weight": "input_layernorm.weight",
    "self_attn.v_proj.weight": "input_layernorm.weight",
    "mlp.experts.gate_up_proj": "post_attention_layernorm.weight",
    "mlp.experts.up_proj": "post_attention_layernorm.weight",
}
"""Matrices (..., H) that read hidden states, and the norm before them."""
_WRITTEN = ("self_attn.experts.o_proj.weight", "mlp.experts.down_proj")
"""Matrices (1, H, ...) that write to them."""
_WRITTEN_BIASES = ("self_attn.o_bias", "mlp.experts.down_proj_bias")


@dataclass(frozen=True)
class Inheritance:
    """
    What a student's block takes from the teacher's.

    Args:
        ffn: "copy" makes every FFN expert the teacher's FFN, "cluster" divides its neurons among the experts (see
            `modmoe.surgery.upcycle_ffn`), "fresh" takes nothing.
        attention: "teacher" gives every expert the projections of all of the teacher's heads, where attention types
            and shapes allow; "fresh" takes nothing.
        reinit: share of neurons drawn anew in copies.
    """

    ffn: Literal["fresh", "copy", "cluster"] = "fresh"
    attention: Literal["fresh", "teacher"] = "fresh"
    reinit: float = 0.0


def inherit(
    student: StudentStage, teacher: Stage, what: Inheritance, seed: int, projection: Tensor | None = None
) -> list[str]:
    """
    Give every block of a student's stage weights of the teacher's block at the same relative depth.

    Args:
        student: changed in place.
        teacher: the stage it is to replace.
        what: is taken.
        seed: of all randomness, with the stage.
        projection: (Ht, Hs) of the stitches, None for equal widths.

    Returns:
        names of the weights that were written, within a block and each once.

    Raises:
        ValueError: if an FFN is to be taken and cannot be; says why.
    """
    if what.ffn == what.attention == "fresh":
        return []
    try:
        native = config_from_dense(teacher.config)
        if projection is not None:
            _check_norms(native, student.config)
    except ValueError:
        if what.ffn != "fresh":
            raise
        return []  # attention is taken where that is possible
    generator = torch.Generator().manual_seed(stage_seed(seed, "inheritance", student.spec.index))
    written: set[str] = set()
    layers = list(student.model.layers)

    def initialize(source: nn.Module, block: nn.Module) -> None:
        weights = _native_block(source, native, teacher.config.model_type)
        if projection is not None:
            weights = _through(weights, projection)
        own = dict(block.named_parameters())
        taken: dict[str, Tensor] = {}
        layer = layers.index(block)
        if what.ffn != "fresh":
            experts = student.config.experts_at(layer)
            taken |= _ffn(weights, own, what, experts, _gate(student.config, *experts), generator)
        if what.attention == "teacher" and student.config.attention_type == native.attention_type:
            experts = student.config.attn_experts_at(layer)
            taken |= _attention(weights, own, experts[1] * _gate(student.config, *experts))
        taken |= _norms(weights, own, taken)
        for name, tensor in taken.items():
            own[name].copy_(tensor)
        written.update(taken)

    initialize_blocks(student, teacher, initialize)
    return sorted(written)


def _native_block(block: nn.Module, config: ModMoEConfig, model_type: str) -> dict[str, Tensor]:
    """The weights of a dense block under native names; a family's recipes for its first block fit all."""
    recipes = FAMILIES[model_type].recipes(config, FAMILIES[model_type].prefix)
    own = block.state_dict()
    return {
        name.partition(_FIRST_BLOCK)[2]: recipe.make(*(own[source.partition(_FIRST_BLOCK)[2]] for source in recipe[0]))
        for name, recipe in recipes.items()
        if _FIRST_BLOCK in name
    }


def _check_norms(teacher: ModMoEConfig, student: ModMoEConfig) -> None:
    """
    Raises:
        ValueError: if no matrix leads through them, see above.
    """
    if {teacher.norm_type, student.norm_type} != {"rmsnorm"}:
        raise ValueError(
            f"teacher and student have norm_type={teacher.norm_type!r} and {student.norm_type!r}, and only RMSNorms "
            "let a student of another width take the teacher's blocks: start it fresh, or give it the teacher's width"
        )


def _through(weights: Mapping[str, Tensor], projection: Tensor) -> dict[str, Tensor]:
    """The weights for hidden states of the student's width; norms keep no weight."""
    scale = (projection.shape[0] / projection.shape[1]) ** 0.5
    projected = {name: tensor for name, tensor in weights.items() if "layernorm" not in name}
    for name, norm in _READ_NORMED.items():
        if name in weights:
            projected[name] = (weights[name].float() * weights[norm].float()) @ projection * scale
    for name in _WRITTEN:
        projected[name] = projection.T @ weights[name].float()
    for name in _WRITTEN_BIASES:
        if name in weights:
            projected[name] = weights[name].float() @ projection
    return projected


def _ffn(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    what: Inheritance,
    experts: tuple[int, int],
    gate: float,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    theirs = {name.removeprefix(_FFN): tensor for name, tensor in weights.items() if name.startswith(_FFN)}
    wanted = {name.removeprefix(_FFN): tuple(own[name].shape) for name in own if name.startswith(_FFN)}
    method = cast(Literal["copy", "cluster"], what.ffn)
    parts, router = upcycle_ffn(
        theirs,
        method,
        *experts,
        reinit=what.reinit,
        input_scale=weights.get("post_attention_layernorm.weight"),
        generator=generator,
    )
    made = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    if made != wanted:
        raise ValueError(
            f"ffn={method!r} makes of the teacher's FFN experts of shapes {made}, and the student's have {wanted}: "
            "change intermediate_size, num_experts, gated_ffn or hidden_size of the student, or take ffn='fresh'"
        )
    # Clusters add up to the teacher's FFN, copies are it each.
    total = gate if method == "cluster" else experts[1] * gate
    parts = {name: part / total if name.startswith("down_proj") else part for name, part in parts.items()}
    taken = {f"{_FFN}{name}": tensor for name, tensor in parts.items()}
    rows = own.get("mlp.gate.weight")
    if router is not None and rows is not None and rows.shape == router.shape:
        taken["mlp.gate.weight"] = router
    return taken


def _gate(config: ModMoEConfig, num_experts: int, top_k: int) -> float:
    """By which an untrained router, which prefers nothing, multiplies each expert that it chooses."""
    if num_experts == 1 or config.unit_gates:
        return 1.0
    return 1 / top_k if config.norm_topk_prob else 1 / num_experts


def _attention(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], gates: float) -> dict[str, Tensor]:
    """All of the projections, or nothing if one does not fit; `gates` is the sum of those of a token's experts."""
    names = [name for name in own if name.startswith(_ATTENTION) and not name.startswith(_ROUTER)]
    taken = {name: _for_each_expert(weights.get(name), own[name]) for name in names}
    fitting = {name: tensor for name, tensor in taken.items() if tensor is not None}
    if len(fitting) < len(names):
        return {}
    return {name: tensor / gates if name in _WRITTEN else tensor for name, tensor in fitting.items()}


def _for_each_expert(tensor: Tensor | None, own: Tensor) -> Tensor | None:
    if tensor is None or tensor.shape not in (own.shape, (1, *own.shape[1:])):
        return None
    return tensor.expand_as(own)


def _norms(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the halves of the block that were taken."""
    halves = {"input_layernorm.": _ATTENTION, "post_attention_layernorm.": _FFN}
    return {
        name: weights[name]
        for norm, half in halves.items()
        if any(name.startswith(half) for name in taken)
        for name in own
        if name.startswith(norm) and name in weights and weights[name].shape == own[name].shape
    }
