import random

from modmoe.data.documents import (
    VALIDATION_FLOOR_BYTES,
    Document,
    cut_at_blank_lines,
    hash_unit,
    validation_threshold,
)

from .conftest import make_texts


def held_out(documents, fraction):
    threshold = validation_threshold(iter(documents), fraction)
    return {document.key for document in documents if hash_unit(document.key) <= threshold}


def test_hash_is_the_same_on_every_machine():
    assert hash_unit("os.py") == 0.943812766417913
    assert abs(sum(hash_unit(str(i)) for i in range(2000)) / 2000 - 0.5) < 0.02


def test_split_does_not_depend_on_order():
    for count in (5, 50, 2000):
        documents = [Document(text, text) for text in make_texts(count)]
        expected = held_out(documents, 0.05)
        for seed in range(3):
            random.Random(seed).shuffle(documents)
            assert held_out(documents, 0.05) == expected


def test_large_corpora_hold_out_the_fraction_and_read_no_more_than_needed():
    documents = iter([Document(str(i), "x" * 1000) for i in range(10_000)])
    assert validation_threshold(documents, 0.05) == 0.05
    assert len(list(documents)) > 8000


def test_small_corpora_hold_out_the_floor():
    documents = [Document(str(i), "x" * 1000) for i in range(300)]
    held = held_out(documents, 0.01)
    assert len(held) == -(-VALIDATION_FLOOR_BYTES // 1000)
    # Growing the corpus never moves a document of the plain fraction out of validation.
    assert {d.key for d in documents if hash_unit(d.key) <= 0.01} < held
    tiny = documents[:10]
    assert len(held_out(tiny, 0.01)) == 2
    assert len(held_out(tiny[:2], 0.01)) == 1


def test_cut_at_blank_lines():
    lines = ["aaa\n", "\n", "bbb\n", "ccc\n", "\n", "ddd\n"]
    assert list(cut_at_blank_lines(lines, 6)) == ["aaa\n\nbbb\nccc\n\n", "ddd\n"]
    assert list(cut_at_blank_lines(["aaaa\n"] * 10, 5)) == ["aaaa\n" * 4, "aaaa\n" * 4, "aaaa\n" * 2]
    assert "".join(cut_at_blank_lines(lines, 1)) == "".join(lines)
