"""Completions and conversations: what is learned of them, and rows that are none."""

import json

import numpy as np
import pytest

from modmoe.data import SourceConfig, TokenizerConfig, prepare_data
from modmoe.data.marked import MarkedEncoder
from modmoe.data.packing import pack_documents
from modmoe.data.sources import Source

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{{ '\n' }}{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "route tokens"},
    {"role": "assistant", "content": "to experts"},
    {"role": "user", "content": "sparse <|endoftext|> modules"},
    {"role": "assistant", "content": "few experts"},
]
IGNORED = -100


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    def with_template(template):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        if template:
            (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
        return tmp_path / "tokenizer"

    return with_template


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(tmp_path, rows, tokenizer, length=64, **options):
    files = [write_rows(tmp_path / "rows.jsonl", rows)]
    config = SourceConfig(name="s", files=files, **{"validation_fraction": 0, **options})
    return prepare_data([config], TokenizerConfig(name=str(tokenizer)), length, tmp_path / "cache", 0, 1)


def first_block(data):
    return data.train._domains["s"][0]


def learned_text(data, block):
    labels = block["labels"]
    assert np.array_equal(labels[labels != IGNORED], block["input_ids"][labels != IGNORED])
    return data.tokenizer.decode(labels[labels != IGNORED])


def test_of_a_completion_the_prompt_is_read_and_the_rest_learned(tmp_path, chat_tokenizer):
    rows = [{"question": "a model", "answer": " learns"}, {"question": "", "answer": "tokens"}]
    fields = {"format": "completion", "prompt_field": "question", "completion_field": "answer"}
    data = prepare(tmp_path, rows * 9, chat_tokenizer(None), length=30, **fields)
    tokens = data.tokenizer.encode("a model"), data.tokenizer.encode(" learns"), data.tokenizer.encode("tokens")
    block = data.train[0]
    eos, block = data.tokenizer.eos_token_id, first_block(data)
    expected = [*tokens[0], *tokens[1], eos, *tokens[2], eos]
    assert block["input_ids"].tolist()[: len(expected)] == expected
    learned = [IGNORED] * len(tokens[0]) + [*tokens[1], eos, IGNORED, *tokens[2][1:], eos]
    assert block["labels"].tolist()[: len(expected)] == learned
    # Parts are encoded apart, so that a prompt has the tokens that it has when a model is asked.
    marked = MarkedEncoder(data.tokenizer, reads_special_tokens=False)
    joint = marked.encode_documents([_document("mod", "el")])[0] & 0xFFFF
    assert joint[:-1].tolist() == data.tokenizer.encode("mod") + data.tokenizer.encode("el")


def _document(prompt, completion):
    from modmoe.data.formats import CompletionRows

    return CompletionRows("p", "c").document({"p": prompt, "c": completion}, "here")


@pytest.mark.parametrize("length", [7, 16, 50])
def test_masks_stay_with_their_documents_however_they_are_packed(encoder, tokenizer, length):
    marked = MarkedEncoder(tokenizer, reads_special_tokens=False)
    documents = [_document(f"prompt {i} <|endoftext|>", f" answer {i}") for i in range(40)]
    arrays = marked.encode_documents(documents)
    blocks = [marked.make_example(block) for block in pack_documents(arrays, length)]
    ids, labels, positions = (
        np.concatenate([b[key] for b in blocks]) for key in ("input_ids", "labels", "position_ids")
    )
    whole, starts = np.concatenate(arrays), np.cumsum([0, *map(len, arrays)])
    assert np.array_equal(ids, (whole & 0x3FFFFFFF)[: len(ids)])
    for number in range(len(documents)):
        start, stop = starts[number], min(starts[number + 1], len(ids))
        if start >= stop:
            continue
        assert positions[start] == 0
        inner = np.arange(start, stop)
        assert np.all((positions[inner] > 0) | (inner == start) | (inner % length == 0))
        prompt = len(tokenizer.encode(f"prompt {number} ")) + len(
            marked._backend.encode("<|endoftext|>", add_special_tokens=False).ids
        )
        assert np.all(labels[start : min(start + prompt, stop)] == IGNORED)
        rest = inner[prompt:]
        expected = np.where(positions[rest] == 0, IGNORED, ids[rest])
        assert np.array_equal(labels[rest], expected)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by role", "marked"])
def test_of_a_conversation_the_assistant_is_learned(tmp_path, chat_tokenizer, template):
    data = prepare(tmp_path, [{"messages": TALK}] * 8, chat_tokenizer(template), length=100, format="chat")
    block = first_block(data)
    newline = "" if template is MARKED else "\n"
    turn = f"to experts<|endoftext|>{newline}few experts<|endoftext|>{newline}"
    assert turn in learned_text(data, block)
    assert "route" not in learned_text(data, block)
    # Ends of turns are no ends of documents.
    length = data.statistics["s"].train.tokens // 8
    assert block["position_ids"].tolist()[:length] == list(range(length))
    assert block["position_ids"][length] == 0
    whole = data.tokenizer.decode(block["input_ids"][:length])
    assert whole == "".join(f"<{m['role']}>{m['content']}<|endoftext|>\n" for m in TALK)


def test_figures_are_of_what_is_learned(tmp_path, chat_tokenizer):
    rows = [{"prompt": "a model " * 5, "completion": f"learns {i}"} for i in range(100)]
    data = prepare(tmp_path, rows, chat_tokenizer(None), length=16, format="completion", validation_fraction=0.3)
    sizes = data.statistics["s"]
    for size in (sizes.train, sizes.validation):
        assert size.text_bytes == pytest.approx(len("learns 10") * size.documents, abs=size.documents)
        assert size.learned_tokens < size.tokens / 2
        assert size.bytes_per_token == size.text_bytes / size.learned_tokens
    again = prepare(tmp_path, rows, chat_tokenizer(None), length=16, format="completion", validation_fraction=0.3)
    assert again.statistics == data.statistics


def test_a_hub_dataset_and_a_stream_give_the_same(tmp_path, chat_tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [{"messages": TALK, "id": i} for i in range(4)]
    directory = tmp_path / "hub"
    directory.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(directory / "train.parquet")
    tokenizer = chat_tokenizer(PLAIN)
    stored = prepare(tmp_path, rows, tokenizer, length=40, format="chat")
    options = {"format": "chat", "validation_fraction": 0}
    for config in (
        SourceConfig(name="s", dataset=str(directory), **options),
        SourceConfig(name="s", files=[str(tmp_path / "rows.jsonl")], streaming=True, **options),
    ):
        other = prepare_data([config], TokenizerConfig(name=str(tokenizer)), 40, tmp_path / "cache", 0, 2)
        first = next(iter(other.train)) if config.streaming else first_block(other)
        expected = first_block(stored)
        assert all(np.array_equal(first[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "x"}, r"rows\.jsonl, line 1: no column 'prompt'; set prompt_field to one of \['completion'\]"),
        ({"prompt": "x"}, r"line 1: no column 'completion'; set completion_field to one of \['prompt'\]"),
        ({"prompt": "x", "completion": ""}, r"line 1: column 'completion' is empty, so there is nothing to learn"),
        ({"prompt": "x", "completion": 3}, r"line 1: column 'completion' must hold text, got int 3"),
    ],
)
def test_rows_that_are_no_completions(tmp_path, chat_tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, [row], chat_tokenizer(None), format="completion")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must hold a list of messages, each with a role and a content that are text, got 'hello'"),
        ([{"role": "user"}], "must hold a list of messages"),
        (TALK[1:], "begins with the assistant"),
        (TALK[:1], "the assistant says nothing"),
        ([TALK[0], {"role": "assistant", "content": ""}], "the assistant says nothing"),
    ],
)
def test_rows_that_are_no_conversations(tmp_path, chat_tokenizer, messages, message):
    with pytest.raises(ValueError, match=rf"line 1: .*{message}"):
        prepare(tmp_path, [{"messages": messages}], chat_tokenizer(MARKED), format="chat")


def test_templates_that_do_not_fit(tmp_path, chat_tokenizer):
    rows = [{"messages": TALK}]
    with pytest.raises(ValueError, match="source 's': format 'chat' needs a chat template, and the tokenizer .* none"):
        prepare(tmp_path, rows, chat_tokenizer(None), format="chat")
    # As templates that leave out the thoughts of earlier turns.
    forgetful = PLAIN.replace("{{ m['content'] }}", "{% if loop.last %}{{ m['content'] }}{% endif %}")
    with pytest.raises(ValueError, match=r"line 1: the chat template writes .* mark it with \{% generation %\}"):
        prepare(tmp_path, rows, chat_tokenizer(forgetful), format="chat")
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="line 1: the chat template refuses this conversation: roles must alternate"):
        prepare(tmp_path, rows, chat_tokenizer(strict), format="chat")


def test_sources_that_have_no_rows(tmp_path):
    with pytest.raises(ValueError, match="format 'chat' needs a tokenizer with a chat template: give tokenizer.name"):
        Source(SourceConfig(name="s", files=[write_rows(tmp_path / "a.jsonl", [{}])], format="chat"))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="format 'completion' needs rows, as JSON lines or parquet, and .*a.txt is"):
        Source(SourceConfig(name="s", files=[str(tmp_path / "a.txt")], format="completion"))
    with pytest.raises(ValueError, match="format must be 'text' with embedded, got 'chat'"):
        SourceConfig(name="s", embedded="c", format="chat")
    with pytest.raises(ValueError, match=r"format must be one of \['text', 'completion', 'chat'\], got 'rows'"):
        SourceConfig(name="s", embedded="c", format="rows")
