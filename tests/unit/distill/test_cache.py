import json

import pytest
import torch

from modmoe.distill.cache import MANIFEST, SignalCache
from modmoe.distill.objective import teacher_kl
from modmoe.distill.signals import TeacherSignals, top_k

IDENTITY = {"teacher": {"weights": "a1"}, "data": "b2", "top_k": 3, "temperature": 1.0}


def batches(count: int = 3, rows: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"logits": torch.randn(rows, 4, 9, generator=generator)} for _ in range(count)]


def signals_of(batch: dict) -> TeacherSignals:
    return TeacherSignals(top_k(batch["logits"], 3, 1.0), {1: batch["logits"][..., :5].bfloat16()})


def open_cache(path, **changes) -> SignalCache:
    return SignalCache(path, IDENTITY | changes, max_bytes=100_000)


def test_examples_come_back_in_any_order(tmp_path):
    cache = open_cache(tmp_path)
    cache.fill(batches(), signals_of)
    assert len(cache) == 6
    logits = torch.cat([batch["logits"] for batch in batches()])[[5, 0, 3]]
    expected = TeacherSignals(top_k(logits, 3, 1.0), {1: logits[..., :5].bfloat16()}).tensors()
    found = open_cache(tmp_path).read([5, 0, 3]).tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_writing_goes_on_where_it_was_interrupted(tmp_path):
    asked = []

    def dies(batch):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(batch)
        return signals_of(batch)

    with pytest.raises(KeyboardInterrupt):
        open_cache(tmp_path / "a").fill(batches(), dies)
    (tmp_path / "a" / "signals_000002.tmp").write_bytes(b"half")
    resumed = open_cache(tmp_path / "a")
    assert len(resumed) == 4
    resumed.fill(batches()[2:], signals_of)
    open_cache(tmp_path / "b").fill(batches(), signals_of)
    for number in range(3):
        name = f"signals_{number:06d}.safetensors"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("change", [{"data": "c3"}, {"top_k": 4}, {"teacher": {"weights": "zz"}}])
def test_a_cache_of_something_else_is_refused(tmp_path, change):
    open_cache(tmp_path).fill(batches(1), signals_of)
    (name, value), *_ = change.items()
    with pytest.raises(ValueError, match=f"was written for {name}=.*not {value!r}"):
        open_cache(tmp_path, **change)


def test_it_does_not_grow_beyond_its_size(tmp_path):
    cache = SignalCache(tmp_path, IDENTITY, max_bytes=700)
    with pytest.raises(ValueError, match="holds 2 examples in .* max_bytes=700: raise it, lower top_k"):
        cache.fill(batches(), signals_of)
    assert len(SignalCache(tmp_path, IDENTITY, max_bytes=700)) == 2


def test_missing_examples_and_damage_are_named(tmp_path):
    cache = open_cache(tmp_path)
    cache.fill(batches(2), signals_of)
    with pytest.raises(IndexError, match="example 4 is not in the cache of 4"):
        cache.read([4])
    short = {"logits": torch.randn(1, 2, 9)}
    cache.append(signals_of(short))
    with pytest.raises(ValueError, match=r"one length, got \[2, 4\]"):
        cache.read([0, 4])
    (tmp_path / "signals_000001.safetensors").unlink()
    with pytest.raises(ValueError, match="signals_000001.safetensors is missing"):
        open_cache(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"ends": [2]}))
    with pytest.raises(ValueError, match="cache.json is damaged"):
        open_cache(tmp_path)


def test_kl_from_a_cache_of_the_whole_vocabulary_is_the_whole_kl(tmp_path):
    batch = batches(1)[0]
    cache = open_cache(tmp_path)
    cache.append(TeacherSignals(top_k(batch["logits"], 9, 2.0)))
    kept = cache.read([0, 1]).logits
    student = torch.randn(2, 4, 9)
    torch.testing.assert_close(teacher_kl(student, kept, 2.0), teacher_kl(student, batch["logits"], 2.0))


@pytest.mark.parametrize("k", [0, 10])
def test_k_lies_within_the_vocabulary(k):
    with pytest.raises(ValueError, match=f"top_k={k} must be between 1 and the size of the vocabulary, 9"):
        top_k(torch.randn(2, 9), k, 1.0)
