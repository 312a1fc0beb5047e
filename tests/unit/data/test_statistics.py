import math
import random

import pytest

from modmoe.data import DomainStatistics, SplitStatistics, byte_unigram_entropy, gzip_bits_per_byte


def test_entropy_of_bytes():
    assert byte_unigram_entropy(bytes(range(256)) * 3) == pytest.approx(8)
    assert byte_unigram_entropy(b"aaaa") == 0
    assert byte_unigram_entropy(b"aabc") == pytest.approx(1.5)


def test_gzip():
    noise = random.Random(0).randbytes(100_000)
    assert 8 <= gzip_bits_per_byte(noise) < 8.02
    assert gzip_bits_per_byte(b"abcdefgh" * 10_000) < 0.05


def test_bits_per_byte():
    size = SplitStatistics(documents=2, text_bytes=4000, tokens=1000)
    statistics = DomainStatistics(train=None, validation=size, byte_unigram_entropy=4.0, gzip_bits_per_byte=2.0)
    # log(256) nats for each 4-byte token: 8 bits for 4 bytes.
    assert statistics.bits_per_byte(math.log(256)) == pytest.approx(2)
    with pytest.raises(ValueError, match="validation split"):
        DomainStatistics(size, None, None, None).bits_per_byte(1.0)
