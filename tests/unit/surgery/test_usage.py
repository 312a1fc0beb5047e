"""Measuring whole models, and the report of it."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import modmoe  # noqa: F401  (registers the model types)
from modmoe.surgery import METRICS, UsageReport, measure_usage
from modmoe.surgery.fingerprint import checkpoint_identity

from ..models.conftest import build as build_native
from .test_routed_modules import build as build_foreign

IBM = Path(__file__).parents[2] / "golden" / "data" / "moduleformer" / "a_mlp_mi"


def ids(seed: int = 1, batch: int = 4, length: int = 10, high: int = 61) -> torch.Tensor:
    return torch.randint(1, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same_sums(a: UsageReport, b: UsageReport, **tolerance: float) -> None:
    assert len(a.routers) == len(b.routers)
    for ours, theirs in zip(a.routers, b.routers, strict=True):
        for name, value in ours.on().tensors().items():
            assert_close(value, theirs.on().tensors()[name], **tolerance)


@pytest.fixture(params=["native", "Mixtral"])
def model(request):
    return build_native() if request.param == "native" else build_foreign("Mixtral")


def test_batches_add_up(model):
    one = measure_usage(model, {"a": [{"input_ids": ids()}]})
    four = measure_usage(model, {"a": ({"input_ids": row[None]} for row in ids())})
    assert one.tokens == four.tokens == {"a": 40}
    assert_same_sums(one, four, rtol=1e-4, atol=1e-4)


def test_domains_are_apart_and_add_up_to_all(model):
    both = measure_usage(model, {"a": [{"input_ids": ids(1)}], "b": [{"input_ids": ids(2)[:1]}]})
    alone = measure_usage(model, {"b": [{"input_ids": ids(2)[:1]}]})
    assert both.domains == ["a", "b"]
    for router, single in zip(both.routers, alone.routers, strict=True):
        assert torch.equal(router.on("b").chosen_together, single.on().chosen_together)
        assert torch.equal(router.on().assignments, router.on("a").assignments + router.on("b").assignments)


def test_padding_counts_for_nothing(model):
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[2, 4:] = 0
    padded = measure_usage(model, {"a": [{"input_ids": ids(), "attention_mask": mask}]})
    alone = measure_usage(model, {"a": [{"input_ids": ids()[[0, 1, 3]]}, {"input_ids": ids()[2:3, :4]}]})
    assert padded.tokens == {"a": 34}
    assert_same_sums(padded, alone, rtol=1e-4, atol=1e-4)


def test_padding_counts_where_the_model_routes_it():
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 7:] = 0
    report = measure_usage(build_native(route_padding=True), {"a": [{"input_ids": ids(), "attention_mask": mask}]})
    assert report.tokens == {"a": 40}


def test_the_model_is_left_as_it_was(model):
    model.train()
    measure_usage(model, {"a": [{"input_ids": ids(), "labels": ids()}]})
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_scores_are_the_figures_of_the_router():
    report = measure_usage(build_native(), {"a": [{"input_ids": ids(1)}], "b": [{"input_ids": ids(2)}]})
    sums = report.router(1, "attn").on("b")
    expected = {
        "frequency": sums.assignments / sums.assignments.sum().double(),
        "gate": sums.gate / sums.tokens,
        "reap": sums.saliency / sums.assignments.clamp_min(1),
    }
    assert expected.keys() == METRICS.keys()
    for metric, value in expected.items():
        assert_close(report.scores(metric, "b", layer=1, side="attn"), value)
    pooled = report.scores("frequency", layer=0, side="ffn")
    assert pooled.sum() == pytest.approx(1)


def test_what_there_is_not_is_named():
    report = measure_usage(build_native(), {"a": [{"input_ids": ids()}]})
    with pytest.raises(ValueError, match="metric 'magic' is not one of frequency, gate, reap"):
        report.scores("magic", layer=0, side="ffn")
    with pytest.raises(ValueError, match="no domain 'b'; it has a"):
        report.scores("reap", "b", layer=0, side="ffn")
    with pytest.raises(ValueError, match="no 'ffn' router of layer 7; it has attn of layer 0, ffn of layer 0"):
        report.scores("reap", layer=7, side="ffn")


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="at least one domain"):
        measure_usage(build_native(), {})
    with pytest.raises(ValueError, match="domain 'empty' has no tokens"):
        measure_usage(build_native(), {"empty": []})
    padding = {"input_ids": ids(), "attention_mask": torch.zeros(4, 10, dtype=torch.long)}
    with pytest.raises(ValueError, match="domain 'padding' has no tokens"):
        measure_usage(build_native(), {"padding": [padding]})


def test_a_report_survives_saving(tmp_path):
    report = measure_usage(build_native(), {"a": [{"input_ids": ids()}], "b": [{"input_ids": ids(2)}]})
    report.save(tmp_path / "usage.json")
    again = UsageReport.load(tmp_path / "usage.json")
    assert_same_sums(again, report, rtol=0, atol=0)
    for router, before in zip(again.routers, report.routers, strict=True):
        assert (router.layer, router.side, router.name, router.top_k) == (
            before.layer,
            before.side,
            before.name,
            before.top_k,
        )
    content = json.loads((tmp_path / "usage.json").read_text())
    first = content["routers"][0]["domains"]["a"]
    assert first["load"] == report.routers[0].on("a").load.tolist()
    assert {"entropy_of_a_token", "entropy_of_the_mean", "mutual_information", "dead_experts"} <= first.keys()


def test_files_that_are_no_report(tmp_path):
    path = tmp_path / "usage.json"
    with pytest.raises(FileNotFoundError, match="no usage report at"):
        UsageReport.load(path)
    for text, message in (
        ("{", "is not a usage report"),
        ("[]", "is JSON but not a usage report"),
        ('{"format": "modmoe-usage", "version": 99}', "version 99 of the format, this modmoe reads 1"),
        ('{"format": "modmoe-usage", "version": 1}', "is damaged"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            UsageReport.load(path)


def test_a_report_knows_its_model(tmp_path):
    model = build_native()
    model.save_pretrained(tmp_path / "model")
    batches = {"a": [{"input_ids": ids()}]}
    report = measure_usage(model, batches, identity=checkpoint_identity(tmp_path / "model"))
    report.save(tmp_path / "usage.json")
    report = UsageReport.load(tmp_path / "usage.json")
    report.check_model(tmp_path / "model")
    model.model.layers[0].mlp.gate.weight.data[0] += 1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=r"of another model \(.*model\) than .*trained.*other values.*--model"):
        report.check_model(tmp_path / "trained")
    with pytest.raises(ValueError, match="names no checkpoint"):
        measure_usage(model, batches).check_model(tmp_path / "model")


def test_a_checkpoint_of_ibm_is_measured_like_its_native_form(tmp_path):
    ibm = AutoModelForCausalLM.from_pretrained(IBM)
    ibm.save_pretrained(tmp_path)
    native = AutoModelForCausalLM.from_pretrained(tmp_path)
    batches = {"a": [{"input_ids": ids(high=ibm.config.vocab_size)}]}
    identity = checkpoint_identity(IBM)
    report = measure_usage(ibm, batches, identity=identity)
    assert_same_sums(report, measure_usage(native, batches), rtol=0, atol=0)
    report.check_model(IBM)
    assert {router.side for router in report.routers} == {"attn", "ffn"}
