"""What a teacher adds to the loss, against sums written out token by token."""

import pytest
import torch

from modmoe import ModMoEConfig, ModMoEForCausalLM
from modmoe.training.finetuning.config import TeacherSection
from modmoe.training.finetuning.teacher import Teacher

from .conftest import MODEL


def make(seed):
    torch.manual_seed(seed)
    fields = MODEL | {"vocab_size": 50, "initializer_range": 0.4, "router_aux_loss_coef": 0.0}
    return ModMoEForCausalLM(ModMoEConfig(**fields)).eval()


@pytest.mark.parametrize(("weight", "temperature", "hidden"), [(0.3, 2.0, 0.0), (1.0, 0.7, 0.5)])
def test_padding_and_prompts_count_for_nothing_however_a_step_is_cut(weight, temperature, hidden):
    student, model = make(0), make(1)
    ids = torch.randint(0, 50, (4, 11), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[3, :4] = 0
    labels[3, :4] = labels[0, :9] = labels[1] = -100
    learned = [(b, t) for b in range(4) for t in range(10) if labels[b, t + 1] != -100]

    teacher = Teacher(model, TeacherSection(weight=weight, temperature=temperature, hidden_weight=hidden))
    total = 0.0
    for rows in ([0], [1, 2], [3]):
        inputs = {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": mask[rows]}
        outputs = student(**inputs, num_items_in_batch=len(learned), output_hidden_states=hidden > 0)
        teacher.teach(outputs, inputs, len(learned), int(mask.sum()))
        total += outputs.loss.item()

    with torch.no_grad():
        mine, theirs = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (student, model))
    expected = 0.0
    for b, t in learned:
        log_q, log_p = ((o.logits[b, t].double() / temperature).log_softmax(-1) for o in (mine, theirs))
        kl = (log_p.exp() * (log_p - log_q)).sum()
        cross_entropy = -mine.logits[b, t].double().log_softmax(-1)[labels[b, t + 1]]
        expected += ((1 - weight) * cross_entropy + weight * temperature**2 * kl).item() / len(learned)
    for ours, target in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        errors = (ours - target).square().sum(-1) / target.square().sum(-1)
        expected += hidden * errors[mask.bool()].sum().item() / mask.sum().item() / len(mine.hidden_states)
    assert total == pytest.approx(expected, rel=1e-5)
