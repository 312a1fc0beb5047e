"""JetMoE and GraniteMoE on modmoe's grouped linear map: the same logits and gradients.

    python examples/swap_parallel_experts.py

In transformers, JetMoE multiplies one expert after another, in its FFN as in its attention, and has no switch for it:
its `JetMoeParallelExperts` are swapped below. GraniteMoE has the switch: `experts_implementation="modmoe"`.
"""

from types import MethodType

import torch
from torch import Tensor, nn
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM, JetMoeConfig, JetMoeForCausalLM
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

import modmoe  # noqa: F401  (registers "modmoe" as an experts implementation)
from modmoe.ops import DispatchPlan, grouped_linear


def grouped_forward(self: JetMoeParallelExperts, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """Rows that JetMoE has already sorted by expert, (S, in) -> (S, out)."""
    counts = torch.tensor(expert_size, dtype=torch.int32, device=inputs.device)
    as_it_is = torch.arange(len(inputs), device=inputs.device)
    plan = DispatchPlan(counts, counts.cumsum(0, dtype=torch.int32), order=as_it_is, inverse=as_it_is)
    return grouped_linear(inputs, self.weight, plan, top_k=1, source="sorted", target="sorted")


def swap_parallel_experts(model: nn.Module) -> int:
    """Both pools of every block: `mlp` and the query and output projections of `self_attention.experts`."""
    pools = [m for m in model.modules() if isinstance(m, JetMoeParallelExperts)]
    for pool in pools:
        pool.forward = MethodType(grouped_forward, pool)
    return len(pools)


def logits_and_gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    logits = model(ids).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def compare(name: str, before: list[Tensor], after: list[Tensor]) -> None:
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * a.abs().max().item())
    print(f"{name}: logits and {len(before) - 1} gradients agree")


def main() -> None:
    torch.manual_seed(0)
    tiny = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 24}
    routing = {"num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3}
    ids = torch.randint(0, 97, (2, 15))

    jetmoe = JetMoeForCausalLM(JetMoeConfig(**tiny, **routing, num_key_value_heads=2, kv_channels=8))
    before = logits_and_gradients(jetmoe, ids)
    swapped = swap_parallel_experts(jetmoe)
    compare(f"JetMoE, {swapped} pools of experts swapped", before, logits_and_gradients(jetmoe, ids))

    granite = GraniteMoeForCausalLM(
        GraniteMoeConfig(**tiny, **routing, num_attention_heads=4, experts_implementation="eager")
    )
    before = logits_and_gradients(granite, ids)
    granite.set_experts_implementation("modmoe")
    compare('GraniteMoE, experts_implementation="modmoe"', before, logits_and_gradients(granite, ids))


if __name__ == "__main__":
    main()
