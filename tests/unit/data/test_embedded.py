import itertools
from pathlib import Path

import pytest

from modmoe.data import SourceConfig, embedded
from modmoe.data.embedded import EMBEDDED_DOMAINS, EmbeddedReader
from modmoe.data.sources import Source


@pytest.mark.parametrize("domain", EMBEDDED_DOMAINS)
def test_domain_has_text_and_a_disjoint_split(domain):
    source = Source(SourceConfig(name=domain, embedded=domain, max_bytes=400_000))
    train = list(source.documents("train"))
    validation = list(source.documents("validation"))
    assert sum(document.num_bytes for document in train) > 200_000
    assert sum(document.num_bytes for document in validation) >= 32_768
    assert {d.key for d in train}.isdisjoint({d.key for d in validation})
    assert {d.text for d in train}.isdisjoint({d.text for d in validation})
    assert train == list(source.documents("train"))


def test_domains_do_not_overlap():
    names = {name for name, _ in EmbeddedReader("python")._contents}
    assert "os.py" in names
    assert "pydoc_data/topics.py" not in names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)
    assert any("assert" in document.text for document in EmbeddedReader("english").read("train"))


def test_unreadable_and_repeated_files_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    contents = {
        "a.h": b"int a;\n",
        "sub/b.h": b"int a;\n",
        "c.h": b"caf\xe9",
        "d.h": b"\0\1",
        "e.h": b"int e;\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(embedded._DOMAINS, "c", lambda: embedded._files(tmp_path, ".h"))
    reader = EmbeddedReader("c")
    assert sorted(document.text for document in reader.read("train")) == ["int a;\n", "int e;\n"]
    assert reader.skipped == {"c.h", "d.h"}


def test_headers_of_torch_stand_in_for_missing_system_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "_SYSTEM_HEADERS", (tmp_path,))
    _, path = next(embedded._c_files())
    assert isinstance(path, Path)
    assert "torch" in path.parts


def test_domains_are_capped(monkeypatch):
    monkeypatch.setattr(embedded, "MAX_DOMAIN_BYTES", 20_000)
    sizes = [document.num_bytes for document in EmbeddedReader("english").read("train")]
    assert sum(sizes[:-1]) < 20_000 <= sum(sizes)
    assert len(list(itertools.islice(EmbeddedReader("c").read("train"), 3))) <= 3


def test_unknown_domain():
    with pytest.raises(ValueError, match=r"one of \['python', 'english', 'c'\], got 'rust'"):
        EmbeddedReader("rust")
