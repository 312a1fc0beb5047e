"""The digits experiment from its first training to its table, at the smallest size."""

import json
from dataclasses import replace

import distill_digits
import pytest
import torch
from distill_digits import BOTH, COMPUTATION, METHODS, STEPS, Digits, Plan, Run, main, schedule

PLAN = Plan(
    num_seeds=1,
    num_stages=2,
    teacher_blocks=3,
    student_blocks=2,
    batch_size=4,
    teacher_steps=2,
    meta_steps=2,
    module_steps=1,
    end_to_end_steps=2,
    rates=(1e-3,),
    curve_points=2,
)


def test_results_are_written_and_work_that_is_done_is_kept(tmp_path, monkeypatch):
    out, results = tmp_path / "out", tmp_path / "results"
    main(PLAN, out, results)
    content = json.loads((results / "distill_digits.json").read_text())
    rows = {(row["method"], row["view"]): row for row in content["summary"]}
    taught = [name for name, method in METHODS.items() if method.start == "modules"]
    others = [name for name in METHODS if name not in taught]
    assert set(rows) == {(m, v) for m in others for v in (STEPS, COMPUTATION)} | {(m, BOTH) for m in taught}
    for name, modular in (("scratch", "m2mKD"), ("logit KD", "m2mKD + logits")):
        assert rows[name, STEPS]["steps"] == rows[modular, BOTH]["steps"] == 2
        step = rows[name, STEPS]["compute"] / 2
        assert rows[name, COMPUTATION]["compute"] == pytest.approx(rows[modular, BOTH]["compute"], abs=step)
    assert "| m2mKD | both | 2 |" in (results / "distill_digits.md").read_text()
    assert (results / "distill_digits.png").stat().st_size > 10_000

    # What is there is not computed again; what was lost is.
    monkeypatch.setattr(distill_digits, "tune", pytest.fail)
    monkeypatch.setattr(Run, "train", pytest.fail)
    main(PLAN, out, results)
    assert json.loads((results / "distill_digits.json").read_text()) == content
    (out / "seed_0.json").unlink()
    lost = []
    monkeypatch.setattr(distill_digits, "run_seed", lambda *args: lost.append(args[3]) or content["seeds"][0])
    main(PLAN, out, results)
    assert lost == [0]
    with pytest.raises(ValueError, match=r"holds the work of another plan .*plan.json.*another --out"):
        main(replace(PLAN, meta_steps=3), out, results)


def test_parts_of_the_digits_share_no_image_and_batches_follow_the_seed():
    parts = Digits().parts
    assert [len(part["labels"]) for part in parts.values()] == [1000, 297, 500]
    every = torch.cat([part["pixel_values"].flatten(1) for part in parts.values()])
    assert len(every) == 1797
    assert len(every.unique(dim=0)) > 1790  # the set itself has a few twins at most
    one, same, other = (list(Digits().batches(2, 8, seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0]["pixel_values"], other[0]["pixel_values"])
    assert one[0]["pixel_values"].shape == (8, 1, 8, 8)


def test_images_move_to_a_side_and_not_up_or_down():
    digits = Digits()
    rows = digits.parts["train"]["pixel_values"].amax(-1)[:, 0]
    batch = next(iter(digits.batches(1, 200, 0)))
    moved = batch["pixel_values"].amax(-1)[:, 0]
    # The brightest pixel of each row stays in its row, unless it left at the side.
    assert sum(bool((rows == row).all(-1).any()) for row in moved) > 150


def test_the_learning_rate_warms_up_and_ends_at_zero():
    assert schedule(0.05) == pytest.approx(0.5)
    assert schedule(0.1) == pytest.approx(1.0)
    assert schedule(1.0) == pytest.approx(0.0)
