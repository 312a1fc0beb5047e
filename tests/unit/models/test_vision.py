import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from modmoe import ModMoEForImageClassification, ModMoEVisionConfig, ModMoEVisionModel

TINY = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 10,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_attn_experts": [1, 2],
    "intermediate_size": 12,
    "num_experts": [1, 4],
    "initializer_range": 0.2,
}


def build(**changes) -> ModMoEForImageClassification:
    torch.manual_seed(0)
    return ModMoEForImageClassification(ModMoEVisionConfig(**(TINY | changes)))


def images(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([1, 2, 3])


def test_an_image_becomes_a_class_token_and_its_patches_row_by_row():
    model = build().model.eval()
    assert model(images()).last_hidden_state.shape == (3, 5, 16)
    embedded = model.embed_tokens(images())
    assert torch.equal(embedded[:, :1], model.embed_tokens.class_token.expand(3, -1, -1))
    corner = torch.nn.functional.conv2d(images()[:, :, :4, 4:], *model.embed_tokens.projection.parameters())
    torch.testing.assert_close(embedded[:, 2], corner.flatten(1))


@torch.no_grad()
def test_every_token_reads_every_patch():
    model = build().eval()
    changed = images()
    changed[:, :, 4:, 4:] += 1  # the last patch
    states, others = model.model(images()).last_hidden_state, model.model(changed).last_hidden_state
    assert not torch.isclose(states, others).all(-1).any()
    assert not torch.allclose(model(images()).logits, model(changed).logits)


@torch.no_grad()
def test_patches_have_places():
    model = build().eval()
    swapped = images().roll(4, dims=-1)
    assert not torch.allclose(model(images()).logits, model(swapped).logits)


def test_the_loss_is_cross_entropy_and_router_losses():
    output = build()(images(), labels=LABELS)
    assert output.logits.shape == (3, 10)
    expected = torch.nn.functional.cross_entropy(output.logits, LABELS)
    torch.testing.assert_close(output.cross_entropy, expected)
    assert output.aux_loss < 0  # mutual information
    assert set(output.aux_losses) == {"mi"}
    torch.testing.assert_close(output.loss, expected + 0.01 * output.aux_loss)
    # Three images of five tokens, two FFN experts and one attention expert each.
    assert [load.sum().item() for load in output.tokens_per_expert] == [30]
    assert [load.sum().item() for load in output.attn_tokens_per_expert] == [15]
    assert output.router_logits is None
    assert build()(images()).loss is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_weight_learns_with_and_without_checkpointing(checkpointing):
    model = build(num_experts_per_tok=2).train()
    model(images(), labels=LABELS).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().sum() > 0 for name, grad in expected.items() if "k_proj.bias" not in name), expected
    if checkpointing:
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(images(), labels=LABELS).loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, expected[name]), name


@torch.no_grad()
def test_saved_models_load_through_the_auto_classes(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is ModMoEForImageClassification
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is ModMoEVisionModel
    assert torch.equal(base(images()).last_hidden_state, model.model(images()).last_hidden_state)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (type(config), config.num_labels) == (ModMoEVisionConfig, 10)
    base.save_pretrained(tmp_path / "base")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base", num_labels=4)
    assert fresh(images()).logits.shape == (3, 4)


@torch.no_grad()
def test_a_dense_vit_is_a_point_of_the_configuration():
    """Its weights give its logits."""
    sizes = {name: TINY[name] for name in ("image_size", "patch_size", "num_channels", "num_labels", "hidden_size")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(**sizes, initializer_range=0.2)).eval()
    for parameter in vit.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    dense = build(num_attn_experts=1, num_experts=1, norm_eps=vit.config.layer_norm_eps).eval()
    theirs = vit.state_dict()
    weights = {
        "model.embed_tokens.class_token": theirs["vit.embeddings.cls_token"],
        "model.embed_positions.weight": theirs["vit.embeddings.position_embeddings"][0],
    }
    for kind in ("weight", "bias"):
        weights[f"model.embed_tokens.projection.{kind}"] = theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        weights[f"model.norm.{kind}"] = theirs[f"vit.layernorm.{kind}"]
        weights[f"classifier.{kind}"] = theirs[f"classifier.{kind}"]
    for index, block in enumerate(vit.vit.layers):
        attention, mlp = block.attention, block.mlp
        own = {
            "self_attn.experts.q_proj.weight": attention.q_proj.weight[None],
            "self_attn.q_bias": attention.q_proj.bias,
            "self_attn.k_proj.weight": attention.k_proj.weight,
            "self_attn.k_proj.bias": attention.k_proj.bias,
            "self_attn.v_proj.weight": attention.v_proj.weight,
            "self_attn.v_proj.bias": attention.v_proj.bias,
            "self_attn.experts.o_proj.weight": attention.o_proj.weight[None],
            "self_attn.o_bias": attention.o_proj.bias,
            "mlp.experts.up_proj": mlp.fc1.weight[None],
            "mlp.experts.up_proj_bias": mlp.fc1.bias[None],
            "mlp.experts.down_proj": mlp.fc2.weight[None],
            "mlp.experts.down_proj_bias": mlp.fc2.bias[None],
            "input_layernorm.weight": block.layernorm_before.weight,
            "input_layernorm.bias": block.layernorm_before.bias,
            "post_attention_layernorm.weight": block.layernorm_after.weight,
            "post_attention_layernorm.bias": block.layernorm_after.bias,
        }
        weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in own.items()}
    dense.load_state_dict(weights)
    torch.testing.assert_close(dense(images()).logits, vit(images()).logits, atol=1e-5, rtol=1e-5)


def test_active_parameters_leave_out_positions_and_unused_experts():
    model = build()
    unused = sum(p.numel() for p in model.model.layers[1].mlp.experts.parameters()) // 2
    unused += sum(p.numel() for p in model.model.layers[1].self_attn.experts.parameters()) // 2
    total = sum(p.numel() for p in model.parameters())
    assert model.num_active_parameters() == total - unused - 5 * 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 3}, "image_size=8 is not a multiple of patch_size=3: change one"),
        ({"num_channels": 0}, "num_channels=0 must be at least 1"),
        ({"max_position_embeddings": 9}, "max_position_embeddings=9 must be 5.*leave it out"),
        ({"attention_type": "stickbreaking"}, "attention_type='stickbreaking' has no place.*leave it at 'softmax'"),
        ({"is_causal": True}, "is_causal=True has no place.*leave it at False"),
        ({"position_embedding": "rope"}, "position_embedding='rope' has no place.*leave it at 'learned'"),
        ({"vocab_size": 100}, "vocab_size=100 is a field of language models: leave it out"),
        ({"num_expert": 3}, "unknown field num_expert=3.*did you mean num_experts"),
        ({"num_experts": [1, 4, 4]}, "num_experts=.* has 3 entries; a list needs one per layer"),
        ({"model_type": "modmoe"}, "model_type='modmoe' is not 'modmoe_vision'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_fields_are_named_with_a_remedy(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        ModMoEVisionConfig(**(TINY | fields))


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"one image have shape \(1, 8, 4\) and must have \(1, 8, 8\): resize"):
        build()(torch.zeros(2, 1, 8, 4))
    with pytest.raises(ValueError, match="exactly one of pixel_values and inputs_embeds"):
        build()()
