"""Fine-tuning a toy model: what is trained, towards what, what goes, and that it resumes exactly."""

import copy
import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import SourceConfig, TokenizerConfig, collate_packed, prepare_data
from modmoe.models.extension import Extension
from modmoe.surgery.extend import add_extension
from modmoe.surgery.fingerprint import checkpoint_identity
from modmoe.surgery.usage import measure_usage
from modmoe.training.arguments import training_arguments
from modmoe.training.callbacks import read_metrics
from modmoe.training.checkpoints.checkpoint import checkpoints
from modmoe.training.checkpoints.consolidation import consolidate
from modmoe.training.checkpoints.output_dir import claim_output_dir, save_run_file
from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import FinetuningRun
from modmoe.training.finetuning.run import FinetuningTrainer, build_tuned_model
from modmoe.training.initialization import model_config
from modmoe.training.run_config import check_run_config
from modmoe.training.yaml_config import apply_override

from .conftest import MODEL

PRUNING = {"keep": 0.5, "steps": 4, "every": 2, "blocks": 4}


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def base(corpus, cache_dir, tmp_path_factory):
    """A model with its tokenizer, to start from."""
    sources = [SourceConfig(name="words", files=[str(corpus)], validation_fraction=0.2)]
    tokenizer = prepare_data(sources, TokenizerConfig(vocab_size=280), 16, cache_dir, 0, 1).tokenizer
    directory = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(5)
    model = ModMoEForCausalLM(model_config(MODEL | {"initializer_range": 0.2}, tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def make(content, base):
    """Fine-tuning run with overrides by dotted key; those without a dot are of the section `finetuning`."""
    content = {name: value for name, value in content.items() if name not in ("model", "tokenizer")}

    def make(overrides=None, **tuning):
        changed = copy.deepcopy(content) | {"init": str(base), "finetuning": tuning}
        for key, value in (overrides or {}).items():
            apply_override(changed, key, value)
        run = check_run_config(changed, FinetuningRun)
        run.output_dir.mkdir(exist_ok=True)
        return run

    return make


def make_trainer(run):
    args = training_arguments(run)
    blocks = run.steps(1) * run.blocks_per_step(1)
    data = prepare_data(
        run.data.sources, run.tokenizer, run.data.sequence_length, run.data.cache_dir, run.seed, blocks
    )
    torch.manual_seed(run.seed)
    return FinetuningTrainer(build_tuned_model(run, data.tokenizer), args, run, data)


def train(run):
    checkpoint = claim_output_dir(run)
    trainer = make_trainer(run)
    save_run_file(run, run.output_dir, {})
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def records(run):
    return [r for r in read_metrics(run.output_dir / "metrics.jsonl") if "loss" in r]


def refused(run):
    with pytest.raises(ConfigError) as caught:
        make_trainer(run)
    return str(caught.value)


def changed_weights(trainer, base):
    before = load_file(base / "model.safetensors")
    return {name for name, tensor in trainer.model.state_dict().items() if not tensor.equal(before[name])}


# ---- What is trained ----


@pytest.mark.parametrize(("method", "mark"), [("full", ""), ("experts", ".experts."), ("routers", ".gate.")])
def test_only_what_the_method_says_is_trained(make, base, method, mark):
    run = make({"optimization.steps": 2, "optimization.weight_decay": 0.5}, method=method)
    trainer = train(run)
    names = {name for name, _ in trainer.model.named_parameters()}
    assert changed_weights(trainer, base) == {name for name in names if mark in name}


@pytest.mark.parametrize("method", ["experts", "routers", "lora"])
def test_resuming_is_bitwise(make, tmp_path, method):
    run = make(method=method)
    train(run)
    straight = load_weights(run)
    newest = checkpoints(run.output_dir)[-1]
    shutil.rmtree(newest)
    resumed = train(run)
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6]
    assert resumed.state.global_step == 6
    again = load_weights(run)
    assert straight.keys() == again.keys()
    assert all(straight[name].equal(again[name]) for name in straight)


def load_weights(run):
    return load_file(checkpoints(run.output_dir)[-1] / "state" / "rank-00000.safetensors")


def test_an_extension_is_trained_alone(make, base, tmp_path):
    add_extension(base, tmp_path / "extended", Extension("new", num_experts=2, num_attn_experts=2))
    changes = {"init": str(tmp_path / "extended"), "optimization.weight_decay": 0.5}
    trainer = train(make(changes, method="extension", extensions=["new"]))
    changed = changed_weights(trainer, tmp_path / "extended")
    assert changed
    assert all(".extensions.new." in name for name in changed)
    changes["output_dir"] = str(tmp_path / "other")
    message = refused(make(changes, method="extension", extensions=["old"]))
    assert message.startswith("finetuning.extensions: the model has no extension 'old'")


@pytest.fixture
def two_sources(tmp_path):
    """Sources whose text shares no letter."""
    sources = []
    for name, letters in (("old", "ab"), ("new", "gh")):
        draw = random.Random(name)
        path = tmp_path / f"{name}.jsonl"
        texts = [" ".join("".join(draw.choices(letters, k=4)) for _ in range(30)) for _ in range(40)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"name": name, "files": [str(path)], "validation_fraction": 0.2})
    return sources


def test_an_extension_learns_what_it_is_for(make, base, two_sources, tmp_path):
    """It declines the tokens of other sources, without having to find out that it does harm."""
    extension = Extension("new", num_experts=2, num_experts_per_tok=2, num_attn_experts=1)
    add_extension(base, tmp_path / "extended", extension)
    changes = {"init": str(tmp_path / "extended"), "data.sources": two_sources}
    changes |= {"optimization.steps": 40, "optimization.learning_rate": 3e-2}
    tuning = {"method": "extension", "extensions": ["new"]}
    run = make(changes, **tuning, domain_loss={"sources": ["new"], "coefficient": 1.0})
    trainer = train(run)
    losses = [record["aux/domain"] for record in records(run)]
    assert losses[-1] < 0.2 < math.log(2) * 0.9 < losses[0]
    used = {}
    for name, dataset in trainer.data.validation.items():
        batch = collate_packed([dataset[0]])
        with torch.no_grad():
            users = trainer.model.eval()(**batch).extension_users["new"]
        used[name] = [float(some / seen) for some, seen in users]
    assert max(used["old"]) < 0.1 < 0.9 < min(used["new"])


def test_a_domain_loss_needs_something_to_tell_apart(make, base, two_sources, tmp_path):
    for mode in ("group", "common"):
        add_extension(base, tmp_path / mode, Extension("new", num_experts=2, mode=mode))
    changes = {"init": str(tmp_path / "group"), "data.sources": two_sources}
    tuning = {"method": "extension", "extensions": ["new"]}

    for sources, message in (
        (["c"], "'c' is none of the sources that are trained on: new, old"),
        (["old", "new"], "there is no text to stay out of"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(changes, **tuning, domain_loss={"sources": sources})
    with pytest.raises(ConfigError, match="set method to 'extension', or remove it"):
        make(changes, method="full", domain_loss={"sources": ["new"]})
    run = make(changes | {"init": str(tmp_path / "common")}, **tuning, domain_loss={"sources": ["new"]})
    assert "has no null choice" in refused(run)


def test_a_dense_model_has_no_experts_to_train(make, base, tmp_path):
    dense = shutil.copytree(base, tmp_path / "dense")
    ones = dict.fromkeys(("num_experts", "num_experts_per_tok", "num_attn_experts", "num_attn_experts_per_tok"), 1)
    ModMoEForCausalLM(ModMoEConfig(**(MODEL | ones), vocab_size=280)).save_pretrained(dense)
    assert "needs a model with routers" in refused(make({"init": str(dense)}, method="routers"))


# ---- LoRA ----


def test_adapters_are_merged_into_a_plain_model_and_kept(make, base):
    peft = pytest.importorskip("peft")
    run = make({"optimization.learning_rate": 0.05}, method="lora", lora={"rank": 2, "alpha": 4})
    trainer = train(run)
    frozen = {name: p for name, p in trainer.model.named_parameters() if "lora_" not in name}
    before = load_file(base / "model.safetensors")
    assert all(p.equal(before[name.replace(".base_layer", "")]) for name, p in frozen.items())
    final = run.output_dir / "final"
    trainer.save_final(final)
    ids = torch.arange(2, 18)[None]
    trainer.model.eval()
    ours = trainer.model(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(final)
    start = AutoModelForCausalLM.from_pretrained(base)
    assert (ours - start(input_ids=ids).logits).abs().max() > 0.05
    torch.testing.assert_close(merged(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in start.named_parameters()}
    adapted = peft.PeftModel.from_pretrained(start, final / "adapter")
    torch.testing.assert_close(adapted(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert json.loads((final / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    checkpoint = checkpoints(run.output_dir)[-1]
    assert (checkpoint / "adapter" / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    with pytest.raises(ValueError, match="checkpoint-6 holds adapters: merge .*checkpoint-6/adapter into"):
        consolidate(checkpoint, run.output_dir / "plain", torch.float32)


def test_targets_are_ends_of_names(make):
    pytest.importorskip("peft")
    run = make(method="lora", lora={"targets": ["k_proj", "experts.q_proj", "0.mlp.experts.down_proj"]})
    trainer = make_trainer(run)
    adapted = {n.partition(".lora_A")[0] for n, p in trainer.model.named_parameters() if ".lora_A" in n}
    layers = [f"model.layers.{layer}.self_attn" for layer in (0, 1)]
    expected = {f"{layer}.{name}" for layer in layers for name in ("k_proj", "experts.q_proj")}
    assert adapted == expected | {"model.layers.0.mlp.experts"}
    assert all(p.requires_grad == ("lora_" in n) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["c_attn"]}, "ends with 'c_attn'; there are down_proj, gate_up_proj, in_proj, k_proj, o_proj"),
        ({"dropout": 0.1}, "dropout=0.1 is for linear layers, and model.layers.0.self_attn.experts.q_proj.weight is"),
    ],
)
def test_adapters_that_cannot_be(make, lora, message):
    pytest.importorskip("peft")
    assert message in refused(make(method="lora", lora=lora))


def test_without_peft_one_sentence_says_so(make, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert refused(make(method="lora")).startswith(
        "finetuning.method='lora' needs PEFT: pip install 'modmoe[finetune]'"
    )


# ---- The routers' loss ----


def test_the_routers_loss_sets_in_by_steps(make, tmp_path):
    loss = {"type": "concentration", "coefficient": 0.4, "warmup_steps": 4}
    run = make(router_loss=loss)
    trainer = train(run)
    numbers = [(r["router_loss_coefficient"], r["loss"] - r["cross_entropy"]) for r in records(run)]
    assert [coefficient for coefficient, _ in numbers] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert [part for _, part in numbers] == pytest.approx(
        [r["router_loss_coefficient"] * r["aux/concentration"] for r in records(run)], rel=1e-4
    )
    trainer.save_final(run.output_dir / "final")
    saved = json.loads((run.output_dir / "final" / "config.json").read_text())
    assert (saved["router_aux_loss_type"], saved["router_aux_loss_coef"]) == ("concentration", 0.4)
    shutil.rmtree(checkpoints(run.output_dir)[-1])
    before = [r["loss"] for r in records(run)]
    train(run)
    assert [r["loss"] for r in records(run)] == before


def test_concentration_shows_in_the_metrics(make):
    run = make(
        {"optimization.steps": 20, "checkpoint.interval": 20, "optimization.learning_rate": 0.1},
        router_loss={"coefficient": 3.0},
        method="routers",
    )
    train(run)
    first, last = records(run)[0], records(run)[-1]
    assert last["aux/concentration"] < 0.5 * first["aux/concentration"]
    assert last["router/ffn/entropy"] < first["router/ffn/entropy"]


# ---- Divergence ----


@pytest.mark.parametrize(("method", "from_place", "helps"), [("full", (), 1), ("lora", (), 0), ("full", ("init",), 0)])
def test_only_a_checkpoint_that_another_run_can_start_from_is_a_remedy(make, method, from_place, helps, monkeypatch):
    monkeypatch.setattr(FinetuningRun, "follows_from_place", from_place)
    trainer = train(make({"optimization.steps": 3}, method=method))
    message = trainer._divergence("the loss is not finite")
    assert "at step 3; lower optimization.learning_rate" in message
    assert message.count(f"--init {checkpoints(trainer.run.output_dir)[-1]}") == helps


# ---- A teacher ----


def test_a_student_that_is_its_teacher_learns_nothing_of_it(make):
    run = make({"optimization.steps": 1}, teacher={"weight": 1.0, "hidden_weight": 1.0}, router_loss={"type": "none"})
    train(run)
    (record,) = records(run)
    assert record["distillation/kl"] == pytest.approx(0, abs=1e-6)
    assert record["distillation/hidden"] == pytest.approx(0, abs=1e-9)
    assert record["loss"] == pytest.approx(0, abs=1e-5)
    assert record["grad_norm"] < 1e-4


def test_the_loss_is_shared_between_data_and_teacher(make, tmp_path):
    teacher = tmp_path / "teacher"
    save_gpt2(teacher, 280)
    logged = []
    for micro, accumulation in ((4, 1), (1, 4)):
        run = make(
            {
                "optimization.steps": 1,
                "optimization.micro_batch_size": micro,
                "optimization.gradient_accumulation": accumulation,
                "output_dir": str(tmp_path / f"{micro}"),
            },
            teacher={"path": str(teacher), "weight": 0.3, "temperature": 2.0},
            router_loss={"type": "none"},
        )
        train(run)
        (record,) = records(run)
        expected = 0.7 * record["cross_entropy"] + 0.3 * 4 * record["distillation/kl"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
        assert record["distillation/kl"] > 0.01
        logged.append((record["loss"], record["distillation/kl"], record["grad_norm"]))
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def save_gpt2(directory, vocab_size, **fields):
    GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=vocab_size, n_positions=16, **fields)
    ).save_pretrained(directory)


def test_teachers_that_do_not_fit(make, base, tmp_path, content):
    save_gpt2(tmp_path / "small", 100)
    message = refused(make(teacher={"path": str(tmp_path / "small")}))
    assert "small predicts 100 tokens and the student 280, so that their distributions cannot be compared" in message
    save_gpt2(tmp_path / "shallow", 280)
    message = refused(make(teacher={"path": str(tmp_path / "shallow"), "hidden_weight": 1.0}))
    assert "has 1 layers of width 8 and the student 2 of width 16" in message
    other = shutil.copytree(base, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "was trained with another tokenizer" in refused(make(teacher={"path": str(other)}))
    message = refused(make(teacher={"path": str(tmp_path / "nowhere")}))
    assert "cannot load" in message
    assert message.endswith("give the directory of a saved model, or its name on the hub")
    assert "\n" not in message


# ---- Pruning on the way ----


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("denominator", ["keep", "drop"])
def test_experts_go_on_the_way_and_out_of_the_export(make, base, scope, denominator):
    run = make(pruning={**PRUNING, "scope": scope, "denominator": denominator})
    trainer = train(run)
    assert [r["experts_left"] for r in records(run)] == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5]
    assert records(run)[0]["distillation/kl"] == pytest.approx(0, abs=1e-6)
    assert records(run)[-1]["distillation/kl"] > 0
    final = run.output_dir / "final"
    trainer.save_final(final)
    assert not [path.name for path in final.iterdir() if path.name.startswith((".", "unpruned"))]
    pruned = AutoModelForCausalLM.from_pretrained(final)
    counts = [pruned.config.experts_at(i)[0] + pruned.config.attn_experts_at(i)[0] for i in range(2)]
    assert sum(counts) == 8
    assert scope == "global" or counts == [4, 4]
    ids = torch.arange(2, 18)[None]
    trainer.model.eval()
    torch.testing.assert_close(pruned(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    checkpoint = checkpoints(run.output_dir)[-1]
    assert not (checkpoint / "model.safetensors").exists()
    with pytest.raises(ValueError, match="checkpoint-6 holds experts that are on their way out: let the run end"):
        consolidate(checkpoint, run.output_dir / "plain", torch.float32)
    events = [json.loads(line) for line in (run.output_dir / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["share"]) for e in events if e["event"] == "pruned"] == [(2, 0.75), (4, 0.5)]


def test_a_pruning_run_resumes_exactly(make):
    run = make(
        {"optimization.steps": 8, "checkpoint.interval": 1, "checkpoint.keep": 9},
        pruning={**PRUNING, "every": 1, "keep": 0.25},
        router_loss={"coefficient": 0.1, "warmup_steps": 6},
    )
    train(run)
    straight, losses = load_weights(run), [r["loss"] for r in records(run)]
    kept = checkpoints(run.output_dir)
    for step in (5, 2):
        for checkpoint in kept[step:]:
            shutil.rmtree(checkpoint, ignore_errors=True)
        train(run)
        assert [r["loss"] for r in records(run)] == losses
        again = load_weights(run)
        assert all(straight[name].equal(again[name]) for name in straight)


def test_a_usage_report_decides(make, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    batches = [
        {"input_ids": torch.randint(2, 280, (2, 16), generator=torch.Generator().manual_seed(i))} for i in (0, 1)
    ]
    report = measure_usage(model, {"words": batches}, identity=checkpoint_identity(base))
    report.save(tmp_path / "usage.json")
    pruning = {**PRUNING, "usage": str(tmp_path / "usage.json"), "metric": "gate"}
    trainer = train(make(pruning=pruning))
    scores = report.scores("gate", layer=1, side="ffn")
    assert trainer._recovery.retired[1, "ffn"] == sorted(scores.argsort()[:2].tolist())
    other = shutil.copytree(base, tmp_path / "other")
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"norm_eps": 0.5}))
    message = refused(make({"init": str(other)}, pruning=pruning))
    assert message.startswith("finetuning.pruning.usage: the usage report is of another model")


def test_pruning_must_leave_time_to_recover(make):
    run = make({"optimization.steps": None, "optimization.tokens": 6 * 64}, pruning={**PRUNING, "steps": 5})
    assert refused(run) == (
        "finetuning.pruning: the last pruning is before step 7, and the run ends after 6: lower "
        "finetuning.pruning.steps or raise optimization.steps"
    )
    run = make({"data.sources.0.streaming": True}, pruning=PRUNING)
    assert "cannot measure on streamed sources" in refused(run)
