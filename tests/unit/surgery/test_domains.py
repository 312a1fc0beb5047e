"""Mutual information of domain and expert in cases that are known."""

import math

import pytest
import torch
from torch.testing import assert_close

from modmoe.surgery.domains import specialisation


def test_experts_of_their_own_have_all_the_information():
    found = specialisation([torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0])])
    assert found.mutual_information == pytest.approx(math.log(2))
    assert found.strengths.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert found.homes.tolist() == [0, 0, 1]


def test_domains_that_are_treated_alike_have_none():
    load = torch.tensor([0.7, 0.2, 0.1])
    found = specialisation([load, load, load])
    assert found.mutual_information == pytest.approx(0, abs=1e-12)
    assert_close(found.domain_shares, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_the_information_is_that_of_its_definition():
    loads = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loads /= loads.sum(1, keepdim=True)
    expected = 0.0
    for d in range(3):
        for m in range(5):
            expected += loads[d, m] / 3 * math.log(loads[d, m] / (loads[:, m].sum() / 3))
    found = specialisation(list(loads))
    assert found.mutual_information == pytest.approx(float(expected))
    assert (found.contributions >= 0).all()


def test_an_expert_without_tokens_belongs_nowhere():
    found = specialisation([torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])])
    assert found.domain_shares[:, 1].tolist() == [0, 0]
    assert found.strengths[1] == 0
    assert found.contributions[1] == 0


def test_one_domain_tells_nothing():
    found = specialisation([torch.tensor([0.9, 0.1])])
    assert found.mutual_information == 0
    assert found.strengths.tolist() == [0, 0]
