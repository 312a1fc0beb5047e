import errno
import itertools
import logging
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

from modmoe.data import store as store_module
from modmoe.data.documents import Document
from modmoe.data.store import TokenStore, build_store

SHARD_TOKENS = 3000


@pytest.fixture
def documents(texts):
    return [Document(text, text) for text in texts]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(store_module, "_BATCH_CHARS", 5000)


class CountingEncoder:
    """Counts the documents that really are tokenised."""

    def __init__(self, encoder):
        self._encoder = encoder
        self.count = 0

    def encode_documents(self, documents):
        self.count += len(documents)
        return self._encoder.encode_documents(documents)

    def num_learned(self, tokens):
        return self._encoder.num_learned(tokens)


def build(directory, documents, encoder):
    return build_store(directory, lambda: iter(documents), encoder, shard_tokens=SHARD_TOKENS)


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_store_holds_the_documents(tmp_path, documents, texts, tokenizer, encoder):
    store = build(tmp_path / "s", documents, encoder)
    assert store.complete
    assert len(store.shards) > 3
    assert all(shard.tokens >= SHARD_TOKENS for shard in store.shards[:-1])
    assert store.num_documents == len(texts)
    assert store.num_text_bytes == sum(map(len, texts))
    tokens = store.read(0, store.num_tokens)
    assert np.array_equal(tokens, np.concatenate(encoder.encode(texts)))
    assert tokenizer.decode(tokens).split("<|endoftext|>") == [*texts, ""]


def test_reading_across_shards(tmp_path, documents, encoder):
    store = build(tmp_path / "s", documents, encoder)
    tokens = store.read(0, store.num_tokens)
    generator = np.random.default_rng(0)
    edges = np.cumsum([shard.tokens for shard in store.shards])
    pairs = [sorted(generator.choice(store.num_tokens, 2, replace=False)) for _ in range(50)]
    for start, stop in [
        *pairs,
        (edges[0] - 1, edges[0]),
        (edges[0], edges[0] + 1),
        (edges[0] - 1, edges[2] + 1),
    ]:
        assert np.array_equal(store.read(start, stop), tokens[start:stop])
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 10_000
    assert np.array_equal(copy.read(5, 9000), tokens[5:9000])


def test_a_finished_store_is_not_touched_and_not_read_as_a_whole(tmp_path, documents, encoder, monkeypatch):
    build(tmp_path / "s", documents, encoder)
    before = files_of(tmp_path / "s")
    monkeypatch.setattr(store_module, "_sha256", lambda path: pytest.fail(f"{path} was hashed"))
    counting = CountingEncoder(encoder)
    build_store(tmp_path / "s", lambda: pytest.fail("documents were read"), counting, shard_tokens=SHARD_TOKENS)
    assert counting.count == 0
    assert files_of(tmp_path / "s") == before


def interrupt(directory, documents, encoder, failure=KeyboardInterrupt):
    """Begin a store."""

    def interrupted():
        yield from documents[:120]
        raise failure

    with pytest.raises(failure):
        build_store(directory, interrupted, encoder, shard_tokens=SHARD_TOKENS)
    return TokenStore.load(directory)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, documents, encoder, failure):
    partial = interrupt(tmp_path / "s", documents, encoder, failure)
    assert not partial.complete
    assert 0 < partial.num_documents < 120

    counting = CountingEncoder(encoder)
    build(tmp_path / "s", documents, counting)
    assert counting.count == len(documents) - partial.num_documents
    build(tmp_path / "whole", documents, encoder)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def _build_and_die(directory, documents, encoder):
    def killed():
        yield from documents[:120]
        os.kill(os.getpid(), signal.SIGKILL)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    build_store(directory, killed, encoder, shard_tokens=SHARD_TOKENS)


def test_a_killed_process_leaves_a_store_to_go_on_with(tmp_path, documents, encoder):
    arguments = (tmp_path / "s", documents, encoder)
    process = multiprocessing.get_context("fork").Process(target=_build_and_die, args=arguments)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    counting = CountingEncoder(encoder)
    build(tmp_path / "s", documents, counting)
    assert 0 < counting.count < len(documents)
    build(tmp_path / "whole", documents, encoder)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def damage_truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_truncate, "bytes long instead of"),
        (os.unlink, "missing"),
    ],
)
@pytest.mark.parametrize("index", [1, -1])
def test_damaged_shards_are_made_again(tmp_path, documents, encoder, caplog, damage, reason, index):
    store = build(tmp_path / "s", documents, encoder)
    before = files_of(tmp_path / "s")
    damage(tmp_path / "s" / store.shards[index].file)
    counting = CountingEncoder(encoder)
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "s", documents, counting)
    assert counting.count == store.shards[index].documents
    assert reason in caplog.text
    assert store.shards[index].file in caplog.text
    assert files_of(tmp_path / "s") == before


def test_an_interrupted_run_does_not_go_on_after_damaged_content(tmp_path, documents, encoder, caplog):
    shard = interrupt(tmp_path / "s", documents, encoder).shards[0]
    content = bytearray((tmp_path / "s" / shard.file).read_bytes())
    content[-1] ^= 1
    (tmp_path / "s" / shard.file).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "s", documents, encoder)
    assert f"{shard.file}: content does not match its hash" in caplog.text
    build(tmp_path / "whole", documents, encoder)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_a_damaged_shard_of_changed_text_is_an_error(tmp_path, documents, encoder):
    build(tmp_path / "s", documents, encoder)
    os.unlink(tmp_path / "s" / "shard-00000.npy")
    with pytest.raises(RuntimeError, match=r"shard-00000\.npy was made of other text .* delete .*/s to tokenise"):
        build(tmp_path / "s", documents[1:], encoder)


def test_a_damaged_manifest_starts_over(tmp_path, documents, encoder, caplog):
    build(tmp_path / "s", documents, encoder)
    before = files_of(tmp_path / "s")
    damage_truncate(tmp_path / "s" / "manifest.json")
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "s", documents, encoder)
    assert "manifest.json is damaged" in caplog.text
    assert files_of(tmp_path / "s") == before


def test_a_full_disk_keeps_finished_shards(tmp_path, documents, encoder, monkeypatch):
    save, calls = np.save, itertools.count()

    def failing_save(file, array):
        if next(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, array)

    monkeypatch.setattr(np, "save", failing_save)
    with pytest.raises(OSError, match=r"no space left to write .*shard-00002.npy: finished shards are kept"):
        build(tmp_path / "s", documents, encoder)
    assert sorted(files_of(tmp_path / "s")) == ["manifest.json", "shard-00000.npy", "shard-00001.npy"]
    counting = CountingEncoder(encoder)
    assert build(tmp_path / "s", documents, counting).complete
    assert 0 < counting.count < len(documents)


def _build_in_process(directory, documents, encoder, barrier):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    barrier.wait()
    build(directory, documents, encoder)


def test_two_processes_fill_one_store(tmp_path, documents, encoder):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    arguments = (tmp_path / "s", documents, encoder, barrier)
    processes = [context.Process(target=_build_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    counting = CountingEncoder(encoder)
    assert build(tmp_path / "s", documents, counting).complete
    build(tmp_path / "alone", documents, encoder)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "alone")
