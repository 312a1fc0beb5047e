"""A small corpus and a tokenizer trained on it."""

import json
import random
from pathlib import Path

import pytest

from modmoe.data.tokenizer import DocumentEncoder, train_bpe

WORDS = ["a", "model", "learns", "sparse", "modules", "route", "tokens", "to", "few", "experts", "each"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Distinct little texts of 20 to 200 words."""
    generator = random.Random(seed)
    return [f"{seed}-{i} " + " ".join(generator.choices(WORDS, k=generator.randint(20, 200))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """One object per line."""
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(200)


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_bpe(iter(texts), 300)


@pytest.fixture(scope="session")
def encoder(tokenizer) -> DocumentEncoder:
    return DocumentEncoder(tokenizer)
