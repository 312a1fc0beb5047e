"""Tables, samples and pictures of a finished run."""

import json

import pytest
import torch

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import DomainStatistics, train_bpe
from modmoe.training.evaluation import DomainScore
from modmoe.training.monitoring.report import draw_loss, sample, score_table, write_expert_use, write_results
from modmoe.training.monitoring.router_load import RouterLoads

from .conftest import MODEL

STATISTICS = {
    "python": DomainStatistics(None, None, byte_unigram_entropy=4.7, gzip_bits_per_byte=1.9),
    "web": DomainStatistics(None, None, byte_unigram_entropy=None, gzip_bits_per_byte=None),
}
PNG = b"\x89PNG"


@pytest.fixture
def scores():
    loads = RouterLoads()
    loads.sums = {
        "attn": [torch.tensor([1.0, 3.0])],
        "ffn": [torch.tensor([1.0, 1.0, 2.0]), torch.tensor([4.0, 0.0])],
    }
    return {"python": DomainScore(2.0, 1.25, loads), "web": DomainScore(3.0, 2.5, loads)}


def test_the_table_sets_scores_beside_compressors(scores):
    header, python, web = (line.split("  ") for line in score_table(scores, STATISTICS).splitlines())
    clean = [[cell.strip() for cell in line if cell.strip()] for line in (header, python, web)]
    assert clean[0] == ["domain", "nats/token", "bits/byte", "gzip -9", "byte unigram"]
    assert clean[1] == ["python", "2.000", "1.250", "1.900", "4.700"]
    assert clean[2] == ["web", "3.000", "2.500", "-", "-"]


def test_results_are_numbers(scores, tmp_path):
    write_results(scores, STATISTICS, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["python"]["bits_per_byte"] == 1.25
    assert results["python"]["gzip_bits_per_byte"] == 1.9


def test_expert_use_of_layers_that_differ(scores, tmp_path):
    pytest.importorskip("matplotlib")
    write_expert_use(scores, {"attn": [1], "ffn": [0, 1]}, tmp_path)
    content = json.loads((tmp_path / "expert_use.json").read_text())
    assert content["layers"] == {"attn": [1], "ffn": [0, 1]}
    assert content["share_of_assignments"]["python"]["ffn"] == [[0.25, 0.25, 0.5], [1.0, 0.0]]
    assert (tmp_path / "expert_use.png").read_bytes()[:4] == PNG


def test_expert_use_of_extensions(scores, tmp_path):
    pytest.importorskip("matplotlib")
    loads = scores["python"].loads
    loads.sums["new/"] = [torch.tensor([3.0, 1.0]), torch.tensor([0.0, 0.0])]
    loads.users["new/"] = [torch.tensor([4.0, 16.0]), torch.tensor([0.0, 16.0])]
    write_expert_use(scores, {"attn": [1], "ffn": [0, 1], "new/ffn": [0, 1]}, tmp_path)
    content = json.loads((tmp_path / "expert_use.json").read_text())
    assert content["share_of_assignments"]["python"]["new/ffn"] == [[0.75, 0.25], [0.0, 0.0]]
    assert content["share_of_tokens_that_use_the_extension"]["web"] == {"new/ffn": [0.25, 0.0]}
    assert (tmp_path / "expert_use.png").read_bytes()[:4] == PNG


@pytest.mark.parametrize("layers", [[], [0, 1]], ids=["no routers", "routers that are not run"])
def test_loads_that_were_not_measured_have_no_picture(tmp_path, layers):
    write_expert_use({"python": DomainScore(2.0, 1.0)}, {"attn": layers, "ffn": layers}, tmp_path)
    assert not (tmp_path / "expert_use.png").exists()


@pytest.mark.parametrize("own", [{"cross_entropy": 5.0}, {}], ids=["labels", "hidden states alone"])
@pytest.mark.parametrize(
    "scores", [[{"step": 2, "eval/python/nats_per_token": 4.5}], []], ids=["scored", "not scored"]
)
@pytest.mark.filterwarnings("error")
def test_the_loss_curve(tmp_path, own, scores):
    pytest.importorskip("matplotlib")
    lines = [{"step": 1, "tokens": 10, "loss": 5.0} | own, {"step": 2, "tokens": 20, "loss": 4.0} | own, *scores]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == PNG


def test_samples_begin_with_the_prompt_and_repeat(tmp_path):
    tokenizer = train_bpe(iter(["def function(): return The #include"] * 3), 280)
    torch.manual_seed(0)
    model = ModMoEForCausalLM(ModMoEConfig(vocab_size=len(tokenizer), eos_token_id=None, **MODEL)).eval()
    before = torch.random.get_rng_state()
    text = sample(model, tokenizer, "python", max_new_tokens=8)
    assert text.startswith("def ")
    assert text == sample(model, tokenizer, "python", max_new_tokens=8)
    assert sample(model, tokenizer, "anything else", max_new_tokens=1).startswith("The ")
    assert torch.random.get_rng_state().equal(before)
