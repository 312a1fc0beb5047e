import pytest

from modmoe.data import SourceConfig, TokenizerConfig


def test_one_place_per_source():
    with pytest.raises(ValueError, match="'a': give exactly one of embedded, dataset and files, got none"):
        SourceConfig(name="a")
    with pytest.raises(ValueError, match=r"exactly one of .* got embedded and dataset"):
        SourceConfig(name="a", embedded="python", dataset="wikitext")


def test_unknown_embedded_domain_lists_the_domains():
    with pytest.raises(ValueError, match=r"embedded must be one of \['python', 'english', 'c'\], got 'rust'"):
        SourceConfig(name="a", embedded="rust")


@pytest.mark.parametrize("weight", [-1.5, float("inf"), float("nan"), True, "2"])
def test_weight_must_be_a_share(weight):
    with pytest.raises(ValueError, match=r"source 'a': weight must be a finite number >= 0, got "):
        SourceConfig(name="a", embedded="c", weight=weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be an integer > 0 or None, got 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1.0"),
        ({"max_validation_bytes": -1}, "max_validation_bytes must be an integer > 0, got -1"),
        ({"split": "test"}, "split must be unset without dataset, got 'test'"),
        ({"validation_files": ["x"]}, "validation_files must be unset without files"),
        ({"files": "x.txt"}, "files must be a list of paths, got 'x.txt'"),
        ({"text_field": ""}, "text_field must be the name of a column, got ''"),
        ({"text_field": 3}, "'a': text_field must be the name of a column, got 3"),
        ({"streaming": "yes"}, "'a': streaming must be true or false, got 'yes'"),
        ({"embedded": ["c"]}, r"'a': embedded must be a string or None, got \['c'\]"),
        ({"embedded": None, "dataset": 1}, "'a': dataset must be a string or None, got 1"),
        ({"embedded": None, "dataset": "x", "split": None}, "'a': split must be the name of a split, got None"),
        ({"name": "a/b"}, "source name must consist of .* got 'a/b'"),
    ],
)
def test_bad_source_values(options, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**{"name": "a", "embedded": "c"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of name and vocab_size, got name=None, vocab_size=None"),
        ({"name": "gpt2", "vocab_size": 300}, "exactly one of name and vocab_size"),
        ({"name": 3}, "name must be a hub name or a directory, got 3"),
        ({"vocab_size": 257}, "vocab_size must be an integer >= 258 .* got 257"),
        ({"vocab_size": 300, "sample_bytes": 0}, "sample_bytes must be an integer > 0, got 0"),
    ],
)
def test_bad_tokenizer_values(options, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**options)


def test_pydantic_embeds_the_configs_and_forbids_unknown_keys():
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(list[SourceConfig])
    assert adapter.validate_python([{"name": "a", "embedded": "c"}]) == [SourceConfig(name="a", embedded="c")]
    with pytest.raises(pydantic.ValidationError, match="wieght"):
        adapter.validate_python([{"name": "a", "embedded": "c", "wieght": 2}])
