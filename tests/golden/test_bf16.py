"""bf16 against fp32 on the golden models: the same function once the experts are the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import modmoe.layers.router as router_module
from modmoe.ops import Routing

DATA = Path(__file__).parent / "data" / "moduleformer"


def choices(out) -> list[torch.Tensor]:
    """In the order in which routers run: attention, then FFN, layer by layer."""
    pairs = zip(out.attn_router_indices, out.router_indices, strict=True)
    return [index for pair in pairs for index in pair]


@torch.no_grad()
@pytest.mark.parametrize("case", sorted(p.name for p in DATA.iterdir()))
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_logits_with_the_experts_of_fp32(case, way, monkeypatch):
    data = load_file(DATA / case / "golden.safetensors")
    batch = {k: data[k] for k in ("input_ids", "attention_mask") if k in data}
    exact = AutoModelForCausalLM.from_pretrained(DATA / case)(**batch, output_router_logits=True)
    dtype = torch.bfloat16 if way == "weights" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(DATA / case, dtype=dtype)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            return model(**batch, output_router_logits=True)

    free = run()
    assert all(x.dtype == torch.float32 for x in free.router_logits + free.attn_router_logits)
    flips = [(a.sort(-1).values != b.sort(-1).values) for a, b in zip(choices(free), choices(exact), strict=True)]
    flipped = torch.cat([f.any(-1).float() for f in flips]).mean()

    forced = iter(choices(exact))

    def route(logits, top_k, **options):
        index = next(forced)
        routed = index < logits.shape[-1]
        gates = logits.softmax(-1).gather(1, index.clamp(max=logits.shape[-1] - 1))
        return Routing(gates * routed, index)

    monkeypatch.setattr(router_module, "route", route)
    real = data["attention_mask"].bool() if "attention_mask" in data else torch.ones_like(batch["input_ids"]).bool()
    ours, theirs = run().logits.float()[real], exact.logits[real]
    error = ((ours - theirs).norm() / theirs.norm()).item()
    print(f"{case} {way}: relative L2 error {error:.4f}, share of tokens with a flipped choice {flipped:.4f}")
    assert error < 2e-2
