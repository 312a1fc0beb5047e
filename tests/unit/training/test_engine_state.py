"""What a process holds of weights and optimizer state; engines with several processes are in tests/distributed."""

import pytest
import torch
from torch import nn

from modmoe.parallel.layout import ExpertSlice, set_expert_slice
from modmoe.training.checkpoints.engine_state import EngineState
from modmoe.training.checkpoints.sharded_state import ShardedState, write_index, write_pieces
from modmoe.training.errors import RunError

OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "adamw foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.1),
}


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.last = nn.Linear(width, 2, bias=False)
        self.tied = self.last
        self.register_buffer("bias", torch.zeros(5))
        self.register_buffer("table", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.last(self.frozen(self.first(x)))


def build(make, seed=0, width=3):
    torch.manual_seed(seed)
    model = Net(width)
    model.bias.normal_()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, make([{"params": trained[:1]}, {"params": trained[1:], "lr": 0.05}])


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        model(torch.randn(6, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(directory, model, optimizer):
    state = EngineState(model, optimizer)
    write_pieces(directory, 0, state.pieces(), state.values())
    write_index(directory, 1)
    return ShardedState(directory)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_new_process_goes_on_in_every_bit(tmp_path, make, before):
    model, optimizer = build(make)
    train(model, optimizer, before)
    for group in optimizer.param_groups:
        group["lr"] *= 0.7
    saved = save(tmp_path, model, optimizer)
    other, other_optimizer = build(make, seed=1)
    EngineState(other, other_optimizer).load(saved)
    assert [g["lr"] for g in other_optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for net, steps_by in ((model, optimizer), (other, other_optimizer)):
        train(net, steps_by, 2)
    for name, tensor in model.state_dict().items():
        assert other.state_dict()[name].equal(tensor), name


def test_every_tensor_is_saved_once_and_tables_are_not(tmp_path):
    model, optimizer = build(OPTIMIZERS["adamw"])
    train(model, optimizer, 1)
    saved = save(tmp_path, model, optimizer)
    trained = ["first.weight", "first.bias", "last.weight"]
    names = [f"weight/{n}" for n in [*trained, "frozen.weight", "frozen.bias", "bias"]]
    assert saved.specs.keys() == {*names, *(f"{moment}/{n}" for n in trained for moment in ("exp_avg", "exp_avg_sq"))}
    assert saved.values == {f"weight/{n}": {"lr": 0.1 if n == trained[0] else 0.05, "step": 1.0} for n in trained}


def test_experts_are_an_interval_of_all_experts():
    model, optimizer = build(OPTIMIZERS["adamw"], width=4)
    set_expert_slice(model.last.weight, ExpertSlice(4, 6, 8))
    (piece,) = [piece for piece in EngineState(model, optimizer).weights() if piece.name == "weight/last.weight"]
    assert (piece.shape, piece.start, piece.data.numel()) == ((8, 4), 16, 8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda model: model.register_buffer("extra", torch.zeros(2)), "it has no tensor extra, which the model has"),
        (lambda model: delattr(model, "first"), "it has a tensor first.bias, which the model does not have"),
        (
            lambda model: setattr(model, "first", nn.Linear(5, 3)),
            r"its tensor first.weight has shape \(3, 4\), the model's \(3, 5\)",
        ),
    ],
)
def test_another_model_is_refused_by_the_first_tensor_that_differs(tmp_path, change, expected):
    saved = save(tmp_path, *build(OPTIMIZERS["sgd"]))
    other, optimizer = build(OPTIMIZERS["sgd"])
    change(other)
    with pytest.raises(ValueError, match=expected):
        EngineState(other, optimizer).load(saved)


def test_state_that_is_no_number_per_weight_is_refused(tmp_path):
    model, optimizer = build(lambda groups: torch.optim.Adafactor(groups))
    train(model, optimizer, 1)
    with pytest.raises(RunError, match="is neither a number nor of its weight's shape: such state cannot be saved"):
        save(tmp_path, model, optimizer)
