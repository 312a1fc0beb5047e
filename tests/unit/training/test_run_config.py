"""Run configs: what is accepted, and one clear sentence for each mistake."""

import json
from pathlib import Path

import pytest
import yaml

from modmoe.training.errors import ConfigError
from modmoe.training.finetuning.config import FinetuningRun
from modmoe.training.run_config import (
    RunConfig,
    build_model_config,
    describe_keys,
    load_run_config,
)
from modmoe.training.yaml_config import load_yaml

ZERO1 = {"zero_optimization": {"stage": 1}}
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def write(content, tmp_path):
    """Write the content, changed by a function, to a file."""

    def write_changed(change=lambda content: None):
        change(content)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write_changed


def message(path, *arguments):
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, arguments)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_parse(path):
    tunes = "finetuning" in yaml.safe_load(path.read_text())
    run = load_run_config(path, kind=FinetuningRun if tunes else RunConfig)
    assert run.deepspeed is not None
    assert "preset" not in run.model
    # The tokenizer decides these; a preset that named them would fit no other.
    assert not {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"} & run.model.keys()


@pytest.mark.parametrize("path", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda p: p.name)
def test_shipped_deepspeed_files_fit_every_run(path):
    run = load_run_config(CONFIGS / "train" / "tiny_test.yaml", ["--deepspeed", str(path)])
    assert run.deepspeed == json.loads(path.read_text())


def test_a_resolved_config_reads_back_as_itself(write, tmp_path):
    run = load_run_config(write())
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load_run_config(again) == run


def test_overrides_reach_every_level(write):
    run = load_run_config(
        write(),
        [
            "--optimization.learning_rate", "3e-4",
            "--data.sources.0.weight=2.5",
            "--model.num_experts", "[4, 2]",
            "--evaluation.interval", "7",
            "--init", "some/dir",
        ],
    )  # fmt: skip
    assert run.optimization.learning_rate == 3e-4
    assert run.data.sources[0].weight == 2.5
    assert run.model["num_experts"] == [4, 2]
    assert run.evaluation.interval == 7
    assert run.init == Path("some/dir")


def test_referenced_files_are_relative_to_the_config_and_overridden_by_it(write, tmp_path):
    (tmp_path / "preset.yaml").write_text("hidden_size: 32\nnum_hidden_layers: 3\n")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')

    def use_files(content):
        content["model"] = {"preset": "preset.yaml", "num_hidden_layers": 5}
        content["deepspeed"] = "ds.json"

    run = load_run_config(write(use_files), ["--deepspeed.zero_optimization.stage", "2"])
    assert (run.model["hidden_size"], run.model["num_hidden_layers"]) == (32, 5)
    assert run.deepspeed == {"zero_optimization": {"stage": 2}}
    assert load_run_config(tmp_path / "run.yaml", ["--deepspeed", "null"]).deepspeed is None


def test_a_preset_on_the_command_line_is_relative_to_the_working_directory(write, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "other.yaml").write_text("hidden_size: 48\n")
    monkeypatch.chdir(tmp_path / "here")
    run = load_run_config(write(lambda content: content["model"].pop("hidden_size")), ["--model.preset", "other.yaml"])
    assert run.model["hidden_size"] == 48


def test_whole_numbers_are_fine_for_float_fields_of_the_model(make_run):
    config = build_model_config(make_run({"model.router_aux_loss_coef": 1}).model)
    assert config.router_aux_loss_coef == 1


def test_tokens_are_rounded_up_to_steps(make_run):
    run = make_run({"optimization.steps": None, "optimization.tokens": 1000})
    assert run.tokens_per_step(world_size=1) == 2 * 2 * 16
    assert run.steps(world_size=1) == 16
    assert run.steps(world_size=2) == 8


@pytest.mark.parametrize("length", [{"steps": 6}, {"steps": None, "tokens": 6 * 64}])
def test_a_warm_up_longer_than_the_run(make_run, length):
    changes = {f"optimization.{key}": value for key, value in length.items()}
    make_run({**changes, "optimization.warmup_steps": 6}).steps(world_size=1)
    with pytest.raises(ConfigError, match="optimization: warmup_steps=7 is more than the run's 6 steps"):
        make_run({**changes, "optimization.warmup_steps": 7}).steps(world_size=1)


def test_auto_leaves_deepspeed_settings_to_us(make_run):
    section = {**ZERO1, "gradient_clipping": "auto", "train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    assert make_run({"deepspeed": section}).zero_stage == 1
    assert make_run().zero_stage is None


def test_home_directories_are_expanded(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text(json.dumps(ZERO1))
    paths = {"output_dir": "~/run", "init": "~/saved", "data.cache_dir": "~/cache", "deepspeed": "~/ds.json"}
    run = load_run_config(write(), [f"--{key}={path}" for key, path in paths.items()])
    assert (run.output_dir, run.init, run.data.cache_dir) == (tmp_path / "run", tmp_path / "saved", tmp_path / "cache")
    assert run.deepspeed == ZERO1


def test_json_may_be_indented_by_tabs(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ZERO1, indent="\t"))
    assert load_yaml(path) == ZERO1


def test_keys_may_be_merged_and_changed(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: {b: {c: &base {x: 1, y: 2}, d: &own {<<: *base, x: 3}}}\ne: {<<: *own, y: 4}\n")
    assert load_yaml(path) == {"a": {"b": {"c": {"x": 1, "y": 2}, "d": {"x": 3, "y": 2}}}, "e": {"x": 3, "y": 4}}


def test_missing_file(tmp_path):
    assert message(tmp_path / "no.yaml") == f"config file {tmp_path / 'no.yaml'} does not exist"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "must hold sections such as 'data:', but holds a list"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("data: &a {seed: 1}\nb: {<<: *a, c: {d: 1, d: 2}}\n", "key 'd' is given twice"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert expected in message(path)


def test_binary_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in message(path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sed", 1, "unknown key sed; did you mean seed?"),
        (
            "optimization.lerning_rate",
            1,
            "unknown key optimization.lerning_rate; did you mean optimization.learning_rate?",
        ),
        ("logging.zzz", 1, "unknown key logging.zzz; valid keys here are interval, tensorboard"),
        ("data.sources.0.wieght", 1, "unknown key data.sources.0.wieght; did you mean data.sources.0.weight?"),
        ("tokenizer.vocab", 1, "unknown key tokenizer.vocab; did you mean tokenizer.vocab_size?"),
        ("model.hiden_size", 1, "model: unknown field hiden_size=1 in ModMoEConfig; did you mean hidden_size"),
    ],
)
def test_unknown_keys_name_the_closest(make_run, write, key, value, expected):
    with pytest.raises(ConfigError) as caught:
        make_run({key: value})
    assert str(caught.value).startswith(expected)
    assert message(write(), f"--{key}", str(value)).startswith(expected)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("optimization.steps", "many", "optimization.steps: input should be a valid integer"),
        ("optimization.steps", -1, "optimization.steps: input should be greater than or equal to 1, got -1"),
        ("optimization.schedule", "zigzag", "optimization.schedule: input should be 'linear', 'cosine'"),
        ("optimization.betas", [0.9, 1.0], "optimization.betas: each of the two must be in [0, 1), got [0.9, 1.0]"),
        ("optimization.tokens", 5, "optimization: give exactly one of steps and tokens, got steps=6, tokens=5"),
        ("optimization.steps", True, "optimization.steps: must not be a boolean, got True"),
        ("optimization.weight_decay", float("inf"), "optimization.weight_decay: input should be a finite number"),
        ("seed", 2**32, "seed: input should be less than 4294967296, got 4294967296"),
        ("output_dir", 2026, "output_dir must be a path, got 2026"),
        ("output_dir", False, "output_dir: must not be a boolean, got False (quote words such as 'no')"),
        ("tokenizer", {"name": "x", "vocab_size": 300}, "tokenizer: give exactly one of name and vocab_size"),
        ("data", "python", "data: input should be a valid dictionary"),
        ("data.sources", [], "data.sources: list should have at least 1 item"),
        ("data.sources.0.weight", -1, "data.sources.0: source 'words': weight must be a finite number >= 0"),
        (
            "model.num_experts_per_tok",
            9,
            "model: num_experts_per_tok=9 in layer 0 must be between 1 and num_experts=4",
        ),
        ("model.hidden_size", "wide", "model: "),
        ("deepspeed", {"optimizer": {}}, "deepspeed: remove 'optimizer': the section 'optimization' decides it"),
        ("deepspeed", {**ZERO1, "gradient_clipping": 5}, "deepspeed: remove 'gradient_clipping'"),
        ("deepspeed", {**ZERO1, "train_batch_size": 32}, "deepspeed: remove 'train_batch_size'"),
        ("deepspeed", {"zero_optimisation": {}}, "deepspeed: zero_optimization is required"),
        ("deepspeed", {"zero_optimization": 2}, "deepspeed: zero_optimization must be a section such as {stage: 1}"),
        ("deepspeed", {"zero_optimization": {"stage": 4}}, "deepspeed: zero_optimization.stage must be 0, 1, 2 or 3"),
        ("deepspeed", {"zero_optimization": {"stage": "1"}}, "deepspeed: zero_optimization.stage must be 0, 1, 2"),
        ("deepspeed", {**ZERO1, "fp16": {"enabled": True}}, "deepspeed: remove 'fp16': optimization.precision is"),
        ("deepspeed", {**ZERO1, "bf16": {"check_grad_overflow": False}}, "deepspeed: remove bf16.check_grad_overflow"),
        ("deepspeed", {"zero_optimization": {}, "bf16": {"enabled": "auto"}}, "deepspeed: bf16.enabled is not exact"),
        ("deepspeed", {**ZERO1, "bf16": {"enabled": True}}, "deepspeed.bf16.enabled=True does not fit optimization."),
    ],
)
def test_wrong_values_name_key_and_value(make_run, key, value, expected):
    with pytest.raises(ConfigError) as caught:
        make_run({key: value})
    assert str(caught.value).startswith(expected)


def test_every_mistake_gets_a_line(make_run):
    with pytest.raises(ConfigError) as caught:
        make_run({"seed": -1, "optimization.steps": "x"})
    assert len(str(caught.value).splitlines()) == 2


def test_missing_sections(write):
    assert message(write(lambda content: content.pop("data"))) == "data is required"


@pytest.mark.parametrize("output_dir", ["saved/final", "saved", "saved/final/run", "other/../saved"])
def test_the_model_of_init_is_not_written_over(make_run, tmp_path, monkeypatch, output_dir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"output_dir {output_dir} and init saved/final lie in each other"):
        make_run({"init": "saved/final", "output_dir": output_dir})
    make_run({"init": "saved/final", "output_dir": "saved-again"})


def test_neither_model_nor_init(make_run):
    with pytest.raises(ConfigError, match="give a 'model' section, or 'init' to start from a saved model"):
        make_run({"model": {}})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optimization.steps", "3"], "unexpected argument 'optimization.steps'"),
        (["--optimization.steps"], "override --optimization.steps has no value"),
        (["--seed.x", "3"], "override --seed.x: seed is the value 5, not a section"),
        (["--data.sources.².weight", "3"], "override --data.sources.².weight: '²' must be a number from 0 to 0"),
        (["--data.sources.4.weight", "3"], "override --data.sources.4.weight: '4' must be a number from 0 to 0"),
        (["--seed", "[1"], "override --seed: '[1' is not a YAML value"),
    ],
)
def test_wrong_overrides(write, arguments, expected):
    assert message(write(lambda content: content.update(seed=5)), *arguments).startswith(expected)


def test_floats_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 3e-4\nb: 1_0.5E3\nc: e4\nd: 1e\n")
    assert load_yaml(path) == {"a": 3e-4, "b": 10500.0, "c": "e4", "d": "1e"}


def test_help_lists_nested_keys():
    text = describe_keys()
    assert "--optimization.learning_rate [0.001]: Peak learning rate." in text
    assert "--output_dir:" in text


def test_backend(write):
    assert load_run_config(write()).backend is None
    assert load_run_config(write(), ["--backend", "torch"]).backend == "torch"
    with pytest.raises(ConfigError, match="backend.*opencl"):
        load_run_config(write(), ["--backend", "opencl"])
