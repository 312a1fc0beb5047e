"""Parity with IBM ModuleFormer: every recorded number of every case (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import modmoe  # noqa: F401  (registers the model types)

DATA = Path(__file__).parent / "data" / "moduleformer"
CASES = sorted(p.name for p in DATA.iterdir())
TOLERANCE = {"hidden": (1e-4, 5e-5), "probability": (1e-4, 1e-5), "loss": (1e-5, 2e-6)}


class Golden:
    """One case: its numbers, the loaded model and one forward and backward pass of it."""

    def __init__(self, case: str, dtype: torch.dtype):
        self.data = load_file(DATA / case / "golden.safetensors")
        self.case, self.dtype = case, dtype
        self.unused = set(self.data) - {"input_ids", "labels", "attention_mask"}
        self.worst = 0.0
        self.model = AutoModelForCausalLM.from_pretrained(DATA / case, dtype=dtype, route_padding=True).eval()
        self.batch = {k: self.data[k] for k in ("input_ids", "attention_mask") if k in self.data}
        self.out = self.model(
            **self.batch,
            labels=self.data["labels"],
            output_hidden_states=True,
            output_attentions=True,
            output_router_logits=True,
        )

    def check(self, key: str, value: torch.Tensor, kind: str) -> None:
        self.unused.discard(key)
        golden = self.data[key].to(value.dtype)
        rtol, atol = TOLERANCE[kind]
        assert value.shape == golden.shape, key
        used = ((value - golden).abs() / (atol + rtol * golden.abs())).max().item()
        self.worst = max(self.worst, used)
        assert used <= 1, f"{self.case} {key}: {used:.2f} of the tolerance"

    def check_exact(self, key: str, value: torch.Tensor) -> None:
        self.unused.discard(key)
        assert torch.equal(value, self.data[key]), f"{self.case} {key}"

    def check_gradient(self, key: str, value: torch.Tensor) -> None:
        self.unused.discard(key)
        golden = self.data[key].to(value.dtype)
        used = ((value - golden).abs().max() / (2e-4 * golden.abs().max() + 1e-7)).item()
        self.worst = max(self.worst, used)
        assert used <= 1, f"{self.case} {key}: {used:.2f} of the tolerance"


@pytest.fixture(scope="module", params=[(c, d) for c in CASES for d in (torch.float32, torch.float64)], ids=str)
def golden(request):
    torch.manual_seed(0)
    golden = Golden(*request.param)
    return golden


def test_every_number(golden):
    """One test walks all keys, so that a key nobody compared is an error."""
    forward(golden)
    routers(golden)
    losses(golden)
    gradients(golden)
    cache(golden)
    generation(golden)
    if "attention_mask" in golden.data:
        padding(golden)
    assert not golden.unused, f"keys never compared: {sorted(golden.unused)}"
    print(f"{golden.case} {golden.dtype}: worst fraction of tolerance {golden.worst:.3f}")


def forward(golden: Golden) -> None:
    out, config = golden.out, golden.model.config
    golden.check("logits", out.logits, "hidden")
    for i, hidden in enumerate(out.hidden_states):
        golden.check(f"hidden_states.{i}", hidden, "hidden")
    for i, output in enumerate(block_outputs(golden)):
        golden.check(f"block_output.{i}", output, "hidden")
    heads, top_k = config.num_attention_heads, config.num_attn_experts_per_tok
    for i, weights in enumerate(out.attentions):
        # Ours are key/value-major, then expert slot; the reference has the slot first.
        golden.check(f"attentions.{i}", weights.unflatten(1, (heads, top_k)).transpose(1, 2), "probability")


def block_outputs(golden: Golden) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda m, a, o: seen.append(o[0])) for b in golden.model.model.layers]
    with torch.no_grad():
        golden.model(**golden.batch)
    for hook in hooks:
        hook.remove()
    return seen


def routers(golden: Golden) -> None:
    shape = golden.data["input_ids"].shape
    sides = {
        "attn": (golden.out.attn_router_logits, golden.out.attn_router_indices),
        "mlp": (golden.out.router_logits, golden.out.router_indices),
    }
    for side, (all_logits, all_indices) in sides.items():
        for i, (logits, index) in enumerate(zip(all_logits, all_indices, strict=True)):
            probs = logits.softmax(-1)
            golden.check(f"router.{i}.{side}.logits", logits.view(*shape, -1), "hidden")
            golden.check(f"router.{i}.{side}.probs", probs.view(*shape, -1), "probability")
            golden.check_exact(f"router.{i}.{side}.indices", index.view(*shape, -1))
            golden.check(f"router.{i}.{side}.gates", probs.gather(1, index).view(*shape, -1), "probability")
            golden.check(f"router.{i}.{side}.aux_loss", one_router_loss(golden, logits, index), "loss")


def one_router_loss(golden: Golden, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    from modmoe.losses import RouterStatistics, router_losses

    config = golden.model.config
    statistics = RouterStatistics.of([logits], [index])
    return router_losses(
        statistics, statistics, balance=config.router_aux_loss_type, z_weight=config.router_z_loss_weight
    ).aux_loss


def losses(golden: Golden) -> None:
    golden.check("loss_ce", golden.out.cross_entropy, "loss")
    golden.check("aux_loss", golden.out.aux_loss, "loss")
    golden.check("loss_total", golden.out.loss, "loss")


def gradients(golden: Golden) -> None:
    model, transposed = golden.model, ("experts.q_proj.weight", "experts.o_proj.weight", "up_proj", "down_proj")
    names = native_names(golden)
    golden.out.aux_loss.backward(retain_graph=True)
    compare_gradients(golden, "grad_aux.", names, transposed)
    model.zero_grad()
    golden.out.loss.backward()
    compare_gradients(golden, "grad.", names, transposed)
    model.zero_grad()


def compare_gradients(golden: Golden, prefix: str, names: dict[str, str], transposed: tuple[str, ...]) -> None:
    parameters = dict(golden.model.named_parameters())
    keys = [k for k in golden.data if k.startswith(prefix)]
    assert keys
    for key in keys:
        name = names[key.removeprefix(prefix)]
        gradient = parameters[name].grad
        if name.endswith(transposed):
            gradient = gradient.transpose(1, 2)
        golden.check_gradient(key, gradient)


def native_names(golden: Golden) -> dict[str, str]:
    """IBM key -> native key, by the renamings the loader uses."""
    import re

    from modmoe.models.moduleformer import CONVERTERS

    rules = AutoConfig.from_pretrained(DATA / golden.case).renamings()
    rules |= {re.escape(c.source_patterns[0]): c.target_patterns[0] for c in CONVERTERS}
    names = {}
    for key in golden.data:
        for prefix in ("grad.", "grad_aux."):
            if key.startswith(prefix):
                old = new = key.removeprefix(prefix)
                for pattern, target in rules.items():
                    new = re.sub(pattern, target, new)
                names[old] = new
    return names


@torch.no_grad()
def cache(golden: Golden) -> None:
    config = golden.model.config
    out = golden.model(**golden.batch, use_cache=True)
    for i in range(config.num_hidden_layers):
        layer = out.past_key_values.layers[i]
        for name, states in (("key", layer.keys), ("value", layer.values)):
            golden.check(f"past.{i}.{name}", states.transpose(1, 2).flatten(2), "hidden")
    ids, mask = golden.data["input_ids"], golden.data.get("attention_mask")
    prompt = int(golden.data["incremental.prompt_length"])
    golden.unused.discard("incremental.prompt_length")
    pieces, past = [], None
    for start, end in [(0, prompt)] + [(t, t + 1) for t in range(prompt, ids.shape[1])]:
        part = None if mask is None else mask[:, :end]
        step = golden.model(ids[:, start:end], attention_mask=part, past_key_values=past, use_cache=True)
        past = step.past_key_values
        pieces.append(step.logits)
    golden.check("incremental.logits", torch.cat(pieces, 1), "hidden")


def generation(golden: Golden) -> None:
    settings = json.loads((DATA / golden.case / "meta.json").read_text())["generate"]
    golden.check_exact("generate.ids", generate(golden, golden.data["generate.prompt_ids"], settings))
    golden.unused.discard("generate.prompt_ids")


def generate(golden: Golden, ids: torch.Tensor, settings: dict) -> torch.Tensor:
    mask = golden.data.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask[:, : ids.shape[1]]
    return golden.model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=settings["max_new_tokens"],
        do_sample=False,
        pad_token_id=settings["pad_token_id"],
    )


@torch.no_grad()
def padding(golden: Golden) -> None:
    """Rows alone without padding; losses with and without pads; and that real positions do not see pads."""
    data, model = golden.data, golden.model
    settings = json.loads((DATA / golden.case / "meta.json").read_text())["generate"]
    for b, row_mask in enumerate(data["attention_mask"].bool()):
        row = data["input_ids"][b, row_mask][None]
        golden.check(f"unpadded.{b}.logits", model(row).logits[0], "hidden")
        key = f"unpadded.{b}.generate_new_ids"
        if key in data:
            new = model.generate(row, max_new_tokens=settings["max_new_tokens"], do_sample=False, pad_token_id=0)
            golden.check_exact(key, new[0, row.shape[1] :])
    counted = model(**golden.batch, labels=data["input_ids"])
    golden.check("loss_ce_pads_counted", counted.cross_entropy, "loss")
    model.config.route_padding = False
    default = model(**golden.batch, labels=data["labels"])
    golden.check("aux_loss_real_tokens_only", default.aux_loss, "loss")
    real = data["attention_mask"].bool()
    rtol, atol = TOLERANCE["hidden"]
    torch.testing.assert_close(default.logits[real], data["logits"].to(golden.dtype)[real], rtol=rtol, atol=atol)
    model.config.route_padding = True
