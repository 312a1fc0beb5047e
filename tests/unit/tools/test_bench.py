"""tools/bench.py: what it does with numbers, that all contenders compute the same, and its command line.

Nothing here looks at how long anything takes.
"""

import json
import math
import shlex

import bench
import pytest
import torch
from benchmarks import attention, experts, models, products, routing, suites, trained
from benchmarks.ceiling import Ceiling
from benchmarks.measure import measure
from benchmarks.report import absentees
from benchmarks.stopwatch import CPUStopwatch
from benchmarks.workload import Contender, Workload
from transformers import JetMoeConfig, JetMoeForCausalLM, LlamaConfig, LlamaForCausalLM

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.data import train_bpe
from modmoe.ops import stickbreaking_attention
from modmoe.ops.build import library_problem

CPU = torch.device("cpu")
CEILING = Ceiling(flops_per_second=1e9, bytes_per_second=1e8)
TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2}
TINY_MODMOE = {
    **TINY,
    "num_attention_heads": 1,
    "head_dim": 8,
    "num_attn_experts": 4,
    "num_attn_experts_per_tok": 2,
    "intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "router_hidden_size": 8,
}

needs_cpp = pytest.mark.usefixtures("cpp")


@pytest.fixture
def cpp():
    if problem := library_problem("cpu"):
        pytest.skip(problem)


def run(workload, rounds=1):
    return measure(workload, CPUStopwatch(), CEILING, rounds, tick=lambda: None)


def check(row, present, tolerance=1e-5):
    """Who ran, that all of them are near float64, and that the numbers of the row belong together."""
    assert set(row.seconds) == set(present)
    for name in present:
        assert row.errors[name]
        for what, error in row.errors[name].items():
            assert error < tolerance, (name, what)
        assert row.peak_growth_mib.keys() == row.quartiles.keys() == row.seconds.keys() >= row.roofline.keys()
    for name, ratios in row.ratios.items():
        for rival, ratio in ratios.items():
            assert ratio == pytest.approx(row.seconds[rival] / row.seconds[name])
    for name in [*row.seconds, *row.absent]:
        assert f"  {name} " in row.text()


# Numbers.


class FakeStopwatch:
    """Every contender returns its time in the first round; each round takes as long again."""

    def __init__(self):
        self.calls = []

    def seconds(self, call):
        result = call()
        self.calls.append((call.args[0].item(), result["out"].item()))
        return result["seconds"].item() * call.args[0].item()

    def peak_growth(self, call):
        return None


def fake_workload(**contenders):
    """Inputs count the draws; each contender takes so many seconds times that, and is off by a factor."""
    draws = iter(range(100))

    def contender(name, seconds, factor, role):
        def work(x):
            return {"out": x * factor, "seconds": torch.tensor(seconds)}

        def exact(x):
            return {"out": x, "seconds": torch.tensor(seconds)}

        return Contender(name, work, exact, role)

    def raises(x):
        raise ImportError("no module named 'missing'\nsecond line")

    return Workload(
        name="fake",
        draw=lambda: torch.tensor(float(next(draws))),
        contenders=[*(contender(name, *c) for name, c in contenders.items()), Contender("missing", raises, raises)],
        tokens=8,
        flops=4e9,
        bytes=2e8,
        fractions=lambda seconds: {"half": seconds["fast"] / seconds["plain"]},
    )


def test_numbers_of_a_row():
    stopwatch, ticks = FakeStopwatch(), []
    workload = fake_workload(fast=(1.0, 1.0, "ours"), plain=(2.0, 1.5, "baseline"), other=(4.0, 0.0, "peer"))
    row = measure(workload, stopwatch, CEILING, 3, lambda: ticks.append(1))
    # Draw 0 finds out who can run; rounds take draws 1, 2 and 3.
    assert row.seconds == {"fast": 2.0, "plain": 4.0, "other": 8.0}
    assert row.quartiles["fast"] == (1.5, 2.5)
    assert row.ratios == {"fast": {"plain": 2.0, "other": 4.0}, "plain": {"other": 2.0}}
    assert (row.bound, row.roofline) == ("torch.mm", {"fast": 2.0, "plain": 1.0, "other": 0.5})
    assert {name: errors["out"] for name, errors in row.errors.items()} == {"fast": 0.0, "plain": 0.5, "other": 1.0}
    assert row.fractions == {"half": 0.5}
    assert row.absent == {"missing": "no module named 'missing'"}
    assert (row.rounds, len(ticks)) == (3, 3)
    # In each round the same inputs for all, and another one goes first.
    assert [draw for draw, _ in stopwatch.calls] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [out for _, out in stopwatch.calls] == [1, 1.5, 0, 3, 0, 2, 0, 3, 4.5]
    text = row.text()
    assert "fast                       2000.000 ms            4    200.0%" in text
    assert "2.00x plain, 4.00x other" in text
    assert "absent: no module named 'missing'" in text
    assert "[3 rounds, bound by torch.mm]" in text


def test_bound_by_the_copy():
    workload = fake_workload(fast=(1.0, 1.0, "ours"), plain=(1.0, 1.0, "ours"))
    row = measure(workload, FakeStopwatch(), CEILING._replace(bytes_per_second=1e7), 1, tick=lambda: None)
    assert (row.bound, row.roofline["fast"]) == ("copy", 20.0)


def test_nan_is_no_small_error():
    workload = fake_workload(fast=(1.0, math.nan, "ours"), plain=(1.0, 1.0, "ours"))
    row = measure(workload, FakeStopwatch(), CEILING, 1, tick=lambda: None)
    assert math.isnan(row.errors["fast"]["out"])
    assert next(line for line in row.text().splitlines() if "  fast " in line).split()[5] == "nan"


def test_absentees_are_listed_once():
    rows = [run(fake_workload(fast=(1.0, 1.0, "ours"), plain=(1.0, 1.0, "ours"))) for _ in range(2)]
    assert absentees(rows) == [
        {"contender": "missing", "reason": "no module named 'missing'", "rows": ["fake", "fake"]}
    ]


def test_memory_of_a_call():
    growth = CPUStopwatch().peak_growth(lambda: torch.ones(2**23))
    assert growth is None or 31 < growth < 40


# Contenders agree with float64.


@needs_cpp
@pytest.mark.parametrize("kind", attention.KINDS)
def test_attention_on_the_cpu(kind):
    arguments = (8, 70, kind, "cpp", CPU, torch.float32)
    baseline = attention.pytorch(attention.forward_backward)
    row = run(attention.training((4, 2), *arguments, (baseline,)))
    check(row, {"cpp", "cpp, all keys", "torch"})
    assert set(row.errors["cpp"]) == {"out", "dq", "dk", "dv"}
    assert row.ratios.keys() == {"cpp", "cpp, all keys", "torch"}
    assert row.ratios["cpp"].keys() == {"torch"}
    row = run(attention.decoding((4, 2), *arguments, (attention.pytorch(attention.forward_only),)))
    check(row, {"cpp", "cpp, all keys", "torch"})


def test_attention_of_the_gpu_suite():
    peers = (attention.public_triton(), *attention.softmax_training())
    # More queries than the reference takes at once.
    row = run(attention.training((2, 2), 8, 530, "short", "triton", CPU, torch.float32, peers))
    check(row, {"SDPA flash (softmax)"})
    assert row.absent.keys() == {"triton", "triton, all keys", "stickbreaking_attention", "flash_attn (softmax)"}
    assert "'triton'" in row.absent["triton"]
    assert row.absent["stickbreaking_attention"] == "No module named 'stickbreaking_attention'"


def test_sticks_are_short_or_long():
    for kind, low, high in (("short", 0.0, 1e-6), ("long", 0.05, 0.5)):
        x = attention.draw(attention.Shape(2, 1, 64, 512, 512), kind, CPU, torch.float32)
        _, remainder = stickbreaking_attention(x.q, x.k, x.v, backend="torch")
        assert low <= remainder[..., 256:].mean() <= high


def test_grouped_products():
    row = run(products.grouped_product(products.Shape(40, 16, 24, 5), ("cpp", "cuda"), CPU, torch.float32))
    check(row, {"torch", "grouped_mm"} | ({"cpp"} - row.absent.keys()))
    assert row.absent["cuda"]
    assert row.ratios["torch"].keys() == {"grouped_mm"}


@pytest.mark.parametrize("gated", [False, True])
def test_expert_layers(gated):
    shape = experts.Shape(24, 16, 8, 5, 2, gated)
    workload = experts.expert_layer(
        shape, ("cpp", "cuda_sm90"), experts.GPU_IMPLEMENTATIONS, CPU, torch.float32, (experts.scattermoe(),)
    )
    row = run(workload)
    check(row, {"torch", "transformers eager", "transformers grouped_mm"} | ({"cpp"} - row.absent.keys()))
    assert set(row.errors["torch"]) == {"y", "dx", "dgates", "dup", "ddown"}
    absent = {"cuda_sm90", "transformers sonicmoe", "transformers megablocks", "scattermoe"}
    assert row.absent.keys() - {"cpp"} == absent
    assert row.absent["scattermoe"] == "No module named 'scattermoe'"


def test_routing():
    row = run(routing.routing(experts.Shape(24, 16, 8, 5, 2, True), ("torch", "cuda"), CPU, torch.float32))
    check(row, {"route, torch", "move, torch", "layer, torch"})
    assert row.absent.keys() == {"route, cuda", "layer, cuda"}
    assert row.roofline.keys() == {"layer, torch"}
    (share,) = row.fractions.values()
    assert share == pytest.approx(
        (row.seconds["route, torch"] + row.seconds["move, torch"]) / row.seconds["layer, torch"]
    )


def test_models(monkeypatch):
    jetmoe = {**TINY, "num_key_value_heads": 1, "kv_channels": 8, "num_local_experts": 4, "intermediate_size": 16}
    tiny = (
        ModMoEForCausalLM(ModMoEConfig(**TINY_MODMOE)),
        JetMoeForCausalLM(JetMoeConfig(**jetmoe, attn_implementation="eager")),
        JetMoeForCausalLM(JetMoeConfig(**jetmoe, attn_implementation="sdpa")),
        LlamaForCausalLM(LlamaConfig(**TINY, num_attention_heads=2, intermediate_size=16)),
    )
    monkeypatch.setattr(models, "build_models", lambda: dict(zip(models.NAMES, tiny, strict=True)))
    monkeypatch.setattr(models, "VOCABULARY", TINY["vocab_size"])
    row = run(models.training(12, bf16=False), rounds=2)
    check(row, models.NAMES, tolerance=1e-4)
    assert row.ratios.keys() == {"ModMoE"}
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(options) or forward)
    row = run(models.decoding(8, bf16=False), rounds=2)
    check(row, (*models.NAMES, "ModMoE, compiled", "HF Llama, compiled"), tolerance=1e-4)
    assert row.ratios.keys() == {"ModMoE", "ModMoE, compiled"}
    assert row.tokens == models.DECODE_STEPS
    assert compiled == [{"fullgraph": True}] * 2


def test_models_are_of_equal_active_size():
    with torch.device("meta"):
        built = models.build_models.__wrapped__()
    llama = built["HF Llama"].model.layers
    weights = sum(p.numel() for p in llama.parameters())
    routers = sum(p.numel() for router, _ in built["ModMoE"].routed_pools() for p in router.parameters())
    assert built["ModMoE"].num_active_parameters() - routers == pytest.approx(weights, rel=0.01)
    assert built["HF JetMoE, eager"].config._attn_implementation == "eager"
    assert built["HF JetMoE, sdpa"].config._attn_implementation == "sdpa"
    names = ("num_hidden_layers", "hidden_size", "vocab_size", "num_key_value_heads", "head_dim")
    sizes = (models.LAYERS, models.HIDDEN, models.VOCABULARY, models.KV_HEADS, models.HEAD_DIM)
    assert tuple(getattr(built["ModMoE"].config, name) for name in names) == sizes


# Trained weights.


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """The directory that a training run leaves, in small."""
    directory = tmp_path_factory.mktemp("final")
    torch.manual_seed(0)
    ModMoEForCausalLM(ModMoEConfig(**TINY_MODMOE)).save_pretrained(directory)
    train_bpe(iter(["def f(x): return x"]), 300).save_pretrained(directory)
    return directory


@needs_cpp
def test_trained_weights(final):
    workloads = list(trained.trained(final, 100, "cpp", CPU, torch.float32))
    assert [w.name for w in workloads] == [f"trained attention, T 100, layer {i}" for i in range(2)]
    row = run(workloads[1])
    check(row, {"cpp", "cpp, all keys"})
    assert 0 < row.fractions["key blocks read"] <= 1
    assert row.ratios["cpp"].keys() == {"cpp, all keys"}
    q, k, v = trained.capture(final, 100, CPU, torch.float32)[1]
    inputs = workloads[1].draw()
    assert all(torch.equal(a, b) for a, b in zip(inputs[:3], (q, k, v), strict=True))
    assert q.shape == (1, 2, 100, 8)


def key_blocks_read(q, k, attend_current):
    """One logit after another, as the kernel goes: tiles of 32 rows, from the newest key that one of them sees."""
    groups, read, total = q.shape[1] // k.shape[1], 0, 0
    rows = [(t, g) for t in range(q.shape[2]) for g in range(groups)]
    for head in range(k.shape[1]):
        logits = (q[0, head * groups : (head + 1) * groups] @ k[0, head].T * q.shape[-1] ** -0.5).tolist()
        for first in range(0, len(rows), 32):
            tile = rows[first : first + 32]
            sticks = dict.fromkeys(tile, 1.0)
            end = tile[-1][0] + 1
            total += math.ceil(end / 24)
            while end > 0 and (end == tile[-1][0] + 1 or max(sticks.values()) >= 2**-29):
                read += 1
                for t, g in tile:
                    for key in range(max(0, end - 24), min(end, t + attend_current)):
                        sticks[t, g] /= 1 + math.exp(logits[g][t][key])
                end -= 24
    return read / total


@pytest.mark.parametrize("attend_current", [True, False])
def test_key_blocks_read(attend_current):
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 400, 8), torch.randn(1, 2, 400, 8)
    q[..., 0], k[..., 0] = 3, -2  # sticks that last for some blocks
    k[:, 0, 300:, 0] = -8  # and longer where the newest keys take little
    share = trained.share_of_key_blocks_read(q, k, attend_current)
    assert 0.4 < share < 0.9
    assert share == key_blocks_read(q, k, attend_current)


def test_key_blocks_read_at_the_diagonal():
    q, k = torch.ones(1, 1, 97, 8), torch.full((1, 1, 97, 8), -100.0)
    k[:, :, 96] = 100  # the last key alone takes anything: all of the last query's stick, if it is seen
    assert trained.share_of_key_blocks_read(q, k, attend_current=True) == 10 / 14
    assert trained.share_of_key_blocks_read(q, k, attend_current=False) == 1


def test_weights_of_another_kind_are_refused(tmp_path, capsys):
    assert bench.main(["cpu", "--weights", str(tmp_path), "--threads", "1"]) == 2
    assert f"{tmp_path} has no config.json" in capsys.readouterr().err
    LlamaConfig(**TINY, num_attention_heads=2).save_pretrained(tmp_path)
    assert bench.main(["cpu", "--weights", str(tmp_path), "--threads", "1"]) == 2
    assert "attention_type=None" in capsys.readouterr().err


# The command line.


def test_rows_have_names_of_their_own():
    for suite in (suites.cpu(torch.float32), suites.gpu(CPU, torch.bfloat16)):
        workloads = list(suite)
        assert len({w.name for w in workloads}) == len(workloads) > 10
        for workload in workloads:
            assert len({c.name for c in workload.contenders}) == len(workload.contenders)
            assert workload.flops > 0
            assert workload.bytes > 0


def test_printed_commands():
    commands = [line.strip() for line in bench.__doc__.splitlines() if line.startswith("    python tools/bench.py ")]
    assert len(commands) > 3
    names = [w.name for w in (*suites.cpu(torch.float32), *suites.gpu(CPU, torch.bfloat16))]
    for command in commands:
        arguments = bench._parse(shlex.split(command)[2:])
        pattern = f"*{arguments.only}*"
        assert arguments.weights or any(bench.fnmatch(name, pattern) for name in names), command


@needs_cpp
def test_table_and_json(tmp_path, capsys):
    out = tmp_path / "figures.json"
    only = "attention decoding*cache 2048, short"
    assert bench.main(["cpu", "--rounds", "2", "--threads", "1", "--only", only, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "attention decoding, D 64, cache 2048, short sticks   [2 rounds, bound by " in text
    content = json.loads(out.read_text())
    about = content["environment"]
    assert about["versions"]["torch"] == torch.__version__
    assert (about["dtype"], about["threads"], about["gpu"]) == ("fp32", 1, None)
    assert about["mm_tflops"] > 0
    assert about["copy_gbytes_per_second"] > 0
    (row,) = content["rows"]
    assert row["rounds"] == 2
    assert row["ratios"]["cpp"]["torch"] == pytest.approx(row["seconds"]["torch"] / row["seconds"]["cpp"])
    assert row["errors"]["cpp"]["out"] < 1e-5
    assert content["absent"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpu", "--only", "nothing"], "matches no row. They are:\nattention training"),
        (["cpu", "--out", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_errors(arguments, message, capsys):
    assert bench.main([*arguments, "--threads", "1"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu(capsys):
    assert bench.main(["gpu", "--threads", "1"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_zero_rounds(capsys):
    with pytest.raises(SystemExit):
        bench.main(["cpu", "--rounds", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
