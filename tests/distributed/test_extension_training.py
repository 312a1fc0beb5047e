"""DeepSpeed trains an extension alone: the old weights stay what they are, with weight decay and sharded states."""

import pytest
import torch
import torch.distributed as dist

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.models.extension import Extension
from modmoe.surgery import train_only
from modmoe.training.optimizer import parameter_groups
from tests.distributed.test_expert_parallel import TINY, batch
from tests.launching import run_ranks

EXTENSIONS = [
    {"name": "group", "num_experts": 3, "num_experts_per_tok": 2, "num_attn_experts": 1},
    {"name": "common", "num_experts": 1, "num_attn_experts": 3, "mode": "common"},
]


def trained(stage, dtype):
    """Names of the parameters that three steps have changed."""
    import deepspeed

    torch.manual_seed(0)
    model = ModMoEForCausalLM(ModMoEConfig(**TINY, extensions=EXTENSIONS))
    train_only(model, ["group", "common"])
    before = {name: p.detach().clone().to(dtype) for name, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    part = {key: value.chunk(dist.get_world_size())[dist.get_rank()] for key, value in batch(False).items()}
    for _ in range(3):
        engine.backward(engine(**part, use_cache=False).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        changed = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    engine.destroy()
    return changed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_only_what_is_new_changes(stage, dtype):
    model = ModMoEForCausalLM(ModMoEConfig(**TINY, extensions=EXTENSIONS))
    new = [n for n, _ in model.named_parameters() if any(Extension.of(e).owns(n) for e in EXTENSIONS)]
    for changed in run_ranks(trained, 2, stage, dtype):
        assert changed == new
