"""A saved dense model made into a saved modular one, tensor by tensor.

Attention stays what it was. Every FFN becomes a pool of experts, see `modmoe.surgery.upcycle_ffn`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import AutoConfig

from modmoe.models.configuration_modmoe import ModMoEConfig
from modmoe.models.dense import NativeWeights, check_dense, config_from_dense
from modmoe.models.modeling_modmoe import ModMoEForCausalLM
from modmoe.models.safetensors_stream import SavedWeights, TensorSpec, WeightsWriter
from modmoe.surgery.model_directory import check_new, copy_tokenizer, new_directory, plain_errors, read_config
from modmoe.surgery.upcycle_ffn import METHODS, Method, check_divides, split_ffn

RouterStart = Literal["centroid", "random"]

# Fields that are free to choose; all others follow from the dense model and the method.
_FREE_FIELDS = {
    "num_experts",
    "num_experts_per_tok",
    "router_type",
    "router_hidden_size",
    "sample_topk",
    "route_padding",
    "use_selection_bias",
    "selection_bias_update_rate",
    "router_aux_loss_type",
    "router_aux_loss_coef",
    "router_aux_loss_reduction",
    "router_z_loss_weight",
    "aux_scope",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "output_router_logits",
}
# Gates with which the start equals the dense model, whose own settings of them mean nothing.
_GATES = {
    "copy": {"norm_topk_prob": True, "unit_gates": False},
    "cluster": {"norm_topk_prob": False, "unit_gates": True},
}


class DenseModel(NamedTuple):
    """A dense model on the disk, in native terms."""

    config: ModMoEConfig
    weights: NativeWeights
    saved: SavedWeights

    def dtype(self, name: str) -> torch.dtype:
        """Of a native tensor, without making it."""
        return self.saved.spec(self.weights.sources(name)[0]).dtype


def upcycle(
    source: Path,
    target: Path,
    method: Method,
    fields: Mapping[str, Any],
    *,
    reinit: float = 0.0,
    router: RouterStart | None = None,
    seed: int = 0,
) -> str:
    """
    Write a modular model that starts as a dense one. Memory holds the FFN of one layer; `source` is only read.

    Args:
        source: directory of a model of one of `modmoe.models.dense.FAMILIES`, in safetensors.
        target: a new directory; it appears once it is complete.
        method: "copy" or "cluster", see `upcycle_ffn`.
        fields: of `ModMoEConfig`, `num_experts` and `num_experts_per_tok` at least.
        reinit: share of each copy's neurons that are drawn anew.
        router: "random", or "centroid" for clusters, which is their default.
        seed: of all randomness.

    Returns:
        one sentence that says what was written, and what it equals.

    Raises:
        FileNotFoundError, FileExistsError: no model in `source`; `target` is taken.
        ValueError: a model that is not dense or has no exact counterpart, or settings that contradict it.
    """
    check_new(target, source)
    router = router or ("centroid" if method == "cluster" else "random")
    dense = open_dense(source)
    config = upcycled_config(dense.config, method, fields, router)
    config.dtype = config.dtype or dense.dtype("model.embed_tokens.weight")
    with new_directory(target, source) as written:
        _write_weights(dense, config, written, method, reinit, router, torch.Generator().manual_seed(seed))
        config.save_pretrained(written)
        copy_tokenizer(source, written)
    return _summary(target, config, method, reinit)


def open_dense(source: Path) -> DenseModel:
    """
    Read the config of a saved dense model, and where its weights are.

    Raises:
        FileNotFoundError: no config.json, or no safetensors.
        ValueError: as `config_from_dense`; weights that the config does not match.
    """
    check_dense(read_config(source))
    with plain_errors():
        theirs = AutoConfig.from_pretrained(source)
        config = config_from_dense(theirs)
    saved = SavedWeights(source)
    return DenseModel(config, NativeWeights(theirs.model_type, config, saved), saved)


def upcycled_config(
    dense: ModMoEConfig, method: Method, fields: Mapping[str, Any], router: RouterStart = "random"
) -> ModMoEConfig:
    """
    The configuration that `method` makes of a dense one.

    Args:
        dense: with one expert.
        method: "copy" or "cluster".
        fields: that are chosen freely, the numbers of experts among them.
        router: how routers will start.

    Raises:
        ValueError: names the field that is missing, unknown or in contradiction with the rest.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    for name in ("num_experts", "num_experts_per_tok"):
        if fields.get(name) is None:
            raise ValueError(f"{name} is not given: say it (--experts and --top-k, or in the config)")
    forced: dict[str, Any] = dense.to_dict() | _GATES[method]
    if method == "cluster":
        forced["intermediate_size"] = _cluster_size(dense.intermediate_size, fields["num_experts"])
    for name, value in fields.items():
        if name in forced and name not in _FREE_FIELDS and value != forced[name]:
            raise ValueError(
                f"{name}={value!r} contradicts the dense model and method={method!r}, from which {forced[name]!r} "
                "follows: leave it out"
            )
    with plain_errors():
        config = ModMoEConfig.from_dict(forced | {"router_type": "linear"} | dict(fields))
    config.architectures = [ModMoEForCausalLM.__name__]
    if router not in get_args(RouterStart):
        raise ValueError(f"router={router!r} must be {' or '.join(get_args(RouterStart))}")
    if router == "centroid" and method == "copy":
        raise ValueError("router='centroid' needs method='cluster': copies have no centroids to tell them apart")
    if router == "centroid" and config.router_type != "linear":
        raise ValueError(
            f"router_type={config.router_type!r} cannot start from centroids: set it to 'linear', or router='random'"
        )
    return config


def _cluster_size(intermediate_size: int, num_experts: int | list[int]) -> int:
    if isinstance(num_experts, list):
        raise ValueError(f"num_experts={num_experts}: clusters have one size in all layers, so give one number")
    check_divides(num_experts, intermediate_size)
    return intermediate_size // num_experts


def _write_weights(dense: DenseModel, config: ModMoEConfig, directory: Path, *how: Any) -> None:
    with torch.device("meta"):
        state = ModMoEForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        for name in ModMoEForCausalLM._tied_weights_keys:
            state.pop(name)
    # Routers are kept in fp32, whatever the rest.
    specs = {
        name: TensorSpec(dense.dtype(name) if name in dense.weights else torch.float32, tuple(tensor.shape))
        for name, tensor in state.items()
    }
    with WeightsWriter(directory, specs) as writer:
        for name, piece in _pieces(dense, config, specs, *how):
            wanted = specs[name].shape
            if piece.shape not in (wanted, (1, *wanted[1:])):
                raise ValueError(f"{name} would be {tuple(piece.shape)}, but config.json says {wanted}: whose is it?")
            writer.write(name, piece)


def _pieces(
    dense: DenseModel,
    config: ModMoEConfig,
    specs: Mapping[str, TensorSpec],
    method: Method,
    reinit: float,
    router: RouterStart,
    generator: torch.Generator,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the modular model; those of pools expert by expert."""
    routed = [layer for layer in range(config.num_hidden_layers) if config.experts_at(layer)[0] > 1]
    pools = {layer: (f"model.layers.{layer}.mlp.experts.", f"model.layers.{layer}.mlp.gate.") for layer in routed}
    in_pools = tuple(prefix for prefixes in pools.values() for prefix in prefixes)
    yield from ((name, dense.weights[name]) for name in specs if not name.startswith(in_pools))
    for layer, (experts, gate) in pools.items():
        ffn = {name.removeprefix(experts): dense.weights[name] for name in specs if name.startswith(experts)}
        norm = dense.weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
        parts, centroids = split_ffn(
            ffn, method, *config.experts_at(layer), reinit=reinit, input_scale=norm, generator=generator
        )
        for part in parts:
            yield from ((experts + name, piece) for name, piece in part.items())
        for name in (name for name in specs if name.startswith(gate)):
            if router == "centroid" and name == f"{gate}weight":
                assert centroids is not None
                yield name, centroids.float()
            else:
                yield name, _start(name, specs[name], config.initializer_range, generator)


def _start(name: str, spec: TensorSpec, std: float, generator: torch.Generator) -> Tensor:
    """A router's tensor as a new model has it."""
    if name.endswith(".weight"):
        return torch.randn(spec.shape, generator=generator) * std
    return torch.zeros(spec.shape)


def _summary(target: Path, config: ModMoEConfig, method: Method, reinit: float) -> str:
    count, top_k = config.num_experts, config.num_experts_per_tok
    what = (
        f"{target}: {count} experts of {config.intermediate_size} neurons in each of {config.num_hidden_layers} layers"
    )
    if method == "copy":
        equal = f"{reinit:.0%} of their neurons are new" if reinit else "it equals its parent"
    else:
        equal = "it equals its parent" if top_k == count else f"it equals its parent with all {count}"
    return f"{what}, {top_k} for each token; {equal}"
