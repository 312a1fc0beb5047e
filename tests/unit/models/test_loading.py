"""Checkpoints load through the Auto classes; damaged or foreign ones are refused with a reason."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from modmoe import ModMoEConfig, ModMoEForCausalLM, ModMoEForSequenceClassification, ModMoEModel

from .conftest import build

ROOT = Path(__file__).parents[3]
IBM = ROOT / "tests" / "golden" / "data" / "moduleformer"
WAYS = [{}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}]


@pytest.fixture
def native(tmp_path) -> Path:
    build().save_pretrained(tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def ibm(tmp_path) -> Path:
    shutil.copytree(IBM / "a_mlp_mi", tmp_path / "ibm")
    return tmp_path / "ibm"


def shard(folder: Path) -> None:
    """Split model.safetensors in two, as large checkpoints are."""
    state = load_file(folder / "model.safetensors")
    names = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(state))}
    for name in names:
        save_file({k: state[k] for k in weight_map if weight_map[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_native_round_trip(native, ids, dtype, way, sharded):
    if sharded:
        shard(native)
    model = AutoModelForCausalLM.from_pretrained(native, dtype=dtype, **way)
    assert type(model) is ModMoEForCausalLM
    assert model.model.layers[0].mlp.experts.down_proj.dtype == dtype
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(model(ids).logits, build().eval()(ids).logits)
    else:
        assert torch.isfinite(model(ids).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("sharded", [False, True])
def test_ibm_saves_as_native_with_the_same_logits(ibm, tmp_path, ids, dtype, way, sharded):
    if sharded:
        shard(ibm)
    model = AutoModelForCausalLM.from_pretrained(ibm, dtype=dtype, **way)
    assert type(model) is ModMoEForCausalLM
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_type"] == "modmoe"
    assert saved["architectures"] == ["ModMoEForCausalLM"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert torch.equal(model(ids).logits, reloaded(ids).logits)
    assert "model.layers.0.self_attn.experts.q_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_the_persistent_buffers_of_ibm_are_accepted(ibm):
    state = load_file(ibm / "model.safetensors")
    state["transformer.h.0.attn.mask"] = torch.ones(16, 16, dtype=torch.int8)
    state["transformer.h.0.attn.cum_weight"] = torch.ones(16, 16)
    save_file(state, ibm / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(ibm)


def test_every_auto_class(native, ibm, ids):
    assert type(AutoConfig.from_pretrained(native)) is ModMoEConfig
    for folder in (native, ibm):
        assert type(AutoModel.from_pretrained(folder)) is ModMoEModel
        classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
        assert type(classifier) is ModMoEForSequenceClassification
        assert classifier(ids[:1]).logits.shape == (1, 3)


def test_classifier_round_trip(tmp_path, ids):
    torch.manual_seed(0)
    model = ModMoEForSequenceClassification(build().config).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids[:1]).logits, model(ids[:1]).logits
    )


def test_text_generation_pipeline(native):
    alphabet = {chr(97 + i): i for i in range(26)} | {"[PAD]": 26}
    backend = Tokenizer(models.WordLevel(alphabet, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(native)
    generate = pipeline("text-generation", model=str(native))
    outputs = generate(["abc", "zy"], max_new_tokens=4, do_sample=False, batch_size=2)
    prompt = generate.tokenizer("abc", return_tensors="pt").input_ids
    expected = generate.model.generate(prompt, max_new_tokens=4, do_sample=False)
    new = generate.tokenizer.decode(expected[0, 3:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = outputs[0][0]["generated_text"]
    assert text.replace(" ", "") == ("abc" + new).replace(" ", "")


def test_damaged_weights(native):
    file = native / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or truncated.*copy or save the checkpoint again"):
        AutoModelForCausalLM.from_pretrained(native)


def test_missing_directory(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(("layers", "message"), [(3, "tensors are missing"), (1, "have no place in the model")])
def test_config_that_does_not_match(native, layers, message):
    file = native / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(ValueError, match=f"do not match the config.*{message}"):
        AutoModelForCausalLM.from_pretrained(native)


def test_widths_that_do_not_match(native):
    file = native / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 25}))
    with pytest.raises(
        ValueError, match=r"another shape, such as model.layers.0.mlp.experts.down_proj: \(6, 32, 24\)"
    ):
        AutoModelForCausalLM.from_pretrained(native)


def test_keywords_are_validated_too(native):
    with pytest.raises(Exception, match="num_experts_per_tok=99 in layer 0 must be between"):
        ModMoEForCausalLM.from_pretrained(native, num_experts_per_tok=99)
    with pytest.raises(ValueError, match="use_safetensors=False would read pickled weights"):
        ModMoEForCausalLM.from_pretrained(native, use_safetensors=False)


@pytest.mark.parametrize("load", [ModMoEForCausalLM, AutoModelForCausalLM])
def test_misspelt_keywords_are_named(native, load):
    with pytest.raises(ValueError, match="does not know the keyword 'num_expert'; did you mean num_experts"):
        load.from_pretrained(native, num_expert=3)
    with pytest.raises(ValueError, match="keyword 'attn_implemntation'; did you mean attn_implementation"):
        load.from_pretrained(native, attn_implemntation="eager")
    with pytest.raises(ValueError, match="keyword 'zzz'; ModMoEConfig names the fields"):
        load.from_pretrained(native, zzz=1)


@pytest.mark.parametrize("asked", [None, "eager", "stickbreaking"])
def test_attention_of_older_checkpoints(native, asked):
    """Configs of before "stickbreaking" had a name say "eager"."""
    model = AutoModelForCausalLM.from_pretrained(native, attn_implementation=asked)
    assert model.config._attn_implementation == "stickbreaking"


def test_selection_bias_can_be_switched_on_for_a_checkpoint_without(native):
    model = ModMoEForCausalLM.from_pretrained(native, use_selection_bias=True)
    assert not model.model.layers[0].mlp.gate.selection_bias.any()


def test_ibm_honours_the_keywords_of_transformers(ibm, ids):
    with pytest.raises(ValueError, match="attn_implementation='sdpa' computes softmax attention"):
        AutoModelForCausalLM.from_pretrained(ibm, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_pretrained(ibm, experts_implementation="grouped_mm", route_padding=True)
    assert model.config._experts_implementation == "grouped_mm"
    assert model.config.route_padding
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ibm))(ids).logits.shape == (3, 20, 97)


def test_pickles_are_refused(native):
    torch.save({}, native / "pytorch_model.bin")
    (native / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights.*only safetensors are loaded.*convert_moduleformer"):
        AutoModelForCausalLM.from_pretrained(native)


def convert(source: Path, target: Path) -> subprocess.CompletedProcess:
    tool = ROOT / "tools" / "convert_moduleformer.py"
    command = [sys.executable, str(tool), str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None)


@torch.no_grad()
def test_converter_reads_old_pickles(ibm, tmp_path, ids):
    expected = AutoModelForCausalLM.from_pretrained(ibm)(ids).logits
    torch.save(load_file(ibm / "model.safetensors"), ibm / "pytorch_model.bin")
    torch.save({}, ibm / "training_args.bin")  # what else lies in such directories
    (ibm / "model.safetensors").unlink()
    result = convert(ibm, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, expected)
    again = convert(ibm, tmp_path / "out")
    assert again.returncode == 2
    assert "exists: name a new directory" in again.stderr


def test_converter_accounts_for_every_key(ibm, tmp_path):
    state = load_file(ibm / "model.safetensors")
    save_file(state | {"transformer.extra": torch.ones(1)}, ibm / "model.safetensors", {"format": "pt"})
    result = convert(ibm, tmp_path / "out")
    assert result.returncode == 2
    assert "1 tensors have no place in the model, such as transformer.extra" in result.stderr
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_logits_do_not_depend_on_where_weights_lie_in_their_file(native, ids):
    """Matrix products on a CPU sum in another order where a matrix begins at an odd address."""
    expected = AutoModelForCausalLM.from_pretrained(native)(ids).logits
    for padding in range(0, 64, 8):
        tensors = load_file(native / "model.safetensors")
        save_file(tensors, native / "model.safetensors", metadata={"format": "pt", "note": "x" * padding})
        model = AutoModelForCausalLM.from_pretrained(native)
        assert not any(p.data_ptr() % 64 for p in model.parameters())
        assert model(ids).logits.equal(expected)
