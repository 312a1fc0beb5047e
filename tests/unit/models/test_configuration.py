"""Unknown or contradictory fields raise an error that names the field, the value and what is allowed."""

from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError

from modmoe import ModMoEConfig, ModMoEForCausalLM

PRESETS = sorted((Path(__file__).parents[3] / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attn_expert": 8}, r"unknown field num_attn_expert=8.*did you mean num_attn_experts"),
        ({"xyzzy": 1}, r"unknown field xyzzy=1.*known fields: .*num_experts"),
        (
            {"num_experts": 2, "num_experts_per_tok": 3},
            r"num_experts_per_tok=3 in layer 0 must be between 1 and num_exp",
        ),
        ({"num_attn_experts": 0}, r"num_attn_experts=0 in layer 0 must be at least 1"),
        (
            {"num_experts": [4, 4], "num_hidden_layers": 3},
            r"num_experts=\[4, 4\] has 2 entries.*num_hidden_layers=3",
        ),
        ({"num_attention_heads": 3}, r"hidden_size=1024 is not a multiple of num_attention_heads=3"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 3},
            r"num_attention_heads=8 must be a multiple of num_key_value",
        ),
        (
            {"is_causal": False},
            r"is_causal=False contradicts attention_type='stickbreaking'.*use attention_type='softmax'",
        ),
        (
            {"attention_type": "relu"},
            r"attention_type.*expected one of \('stickbreaking', 'softmax'\), got relu",
        ),
        ({"router_type": "hash"}, r"router_type.*expected one of \('mlp', 'linear', 'gmm'\), got hash"),
        (
            {"router_aux_loss_type": "x"},
            r"router_aux_loss_type.*'mi', 'concentration', 'switch', 'none'.*got x",
        ),
        ({"hidden_size": "wide"}, r"hidden_size.*expected int, got str \(value: 'wide'\)"),
        ({"vocab_size": 0}, r"vocab_size=0 must be between 1 and"),
        ({"router_aux_loss_coef": -1}, r"router_aux_loss_coef=-1 must be between 0.0 and"),
        ({"router_z_loss_weight": float("nan")}, r"router_z_loss_weight=nan must be between"),
        ({"norm_eps": 0}, r"norm_eps=0 must be greater than 0"),
        ({"attention_type": "softmax", "attention_dropout": 2}, r"attention_dropout=2 must be between 0.0 and 1.0"),
        ({"pad_token_id": 32000}, r"pad_token_id=32000 is outside the vocabulary 0..31999"),
        ({"model_type": "llama"}, r"model_type='llama' is not 'modmoe'"),
        ({"sample_topk": 3}, r"sample_topk=3 must be between 0 and num_attn_experts_per_tok=2"),
        ({"num_pruned_experts": [0, 1]}, r"num_pruned_experts=\[0, 1\] has 2 entries; a list needs one per layer"),
        ({"num_pruned_attn_experts": -1}, r"num_pruned_attn_experts=-1 in layer 0 must be at least 0"),
        ({"num_experts": 1, "num_pruned_experts": 3, "sample_topk": 2}, r"sample_topk=2 must .* num_experts=1"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0.1 needs attention_type='softmax'"),
        ({"hidden_act": "swoosh"}, r"hidden_act='swoosh' is not an activation.*silu"),
        ({"attention_type": "softmax", "head_dim": 7}, r"head_dim=7 must be even"),
        ({"position_embedding": "learned"}, r"position_embedding='learned' needs attention_type='softmax'"),
        ({"unit_gates": True, "norm_topk_prob": True}, r"unit_gates=True contradicts norm_topk_prob=True"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_fields(fields, message):
    # Field types fail with the strict dataclass' own error classes.
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        ModMoEConfig(**fields)


def test_round_trip(tmp_path):
    config = ModMoEConfig(
        num_experts=[4] * 24, num_labels=5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
    )
    config.save_pretrained(tmp_path)
    loaded = ModMoEConfig.from_pretrained(tmp_path)
    ours, theirs = loaded.to_dict(), config.to_dict()
    for key in ("architectures", "transformers_version"):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs


def test_an_unknown_field_in_a_saved_config_is_an_error(tmp_path):
    config = ModMoEConfig()
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_experts":', '"num_expert":'))
    with pytest.raises(ValueError, match="unknown field num_expert="):
        ModMoEConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_build(path):
    with torch.device("meta"):
        ModMoEForCausalLM(ModMoEConfig(**yaml.safe_load(path.read_text())))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("molm_350m_4b", 4.19e9, 365e6), ("molm_700m_4b", 4.19e9, 667e6), ("molm_700m_8b", 8.28e9, 731e6)],
)
def test_molm_presets_have_the_published_sizes(name, total, active):
    path = next(p for p in PRESETS if p.stem == name)
    with torch.device("meta"):
        model = ModMoEForCausalLM(ModMoEConfig(**yaml.safe_load(path.read_text())))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=2e-3)
    assert model.num_active_parameters() == pytest.approx(active, rel=2e-3)
