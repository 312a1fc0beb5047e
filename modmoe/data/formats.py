"""From the rows of a dataset to documents: plain text, prompts with completions, conversations."""

import re
from collections.abc import Iterable
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from .config import SourceConfig
from .documents import Document, Span

Row = dict[str, Any]


class RowFormat(Protocol):
    """What the columns of a source mean."""

    columns: list[str]

    def document(self, row: Row, place: object) -> Document:
        """
        Raises:
            ValueError: for a row that is no document; names its place.
        """

    def fingerprint(self) -> object:
        """Everything that decides which documents come out of the rows, JSON-serialisable."""


def row_format(config: SourceConfig, tokenizer: PreTrainedTokenizerFast | None) -> RowFormat:
    """
    Args:
        config: the source.
        tokenizer: that reads it; needed for conversations, and None if it is yet to be trained.

    Raises:
        ValueError: if conversations have no chat template.
    """
    if config.format == "completion":
        return CompletionRows(config.prompt_field, config.completion_field)
    if config.format == "chat":
        return ChatRows(config.name, config.messages_field, tokenizer)
    return TextRows(config.text_field)


class TextRows:
    """One column of text. Texts are their own keys."""

    def __init__(self, field: str) -> None:
        self.columns = [field]

    def document(self, row: Row, place: object) -> Document:
        text = _text(row, self.columns[0], "text_field", place)
        return Document(text, text)

    def fingerprint(self) -> object:
        return self.columns[0]


class CompletionRows:
    """A prompt, which is read, and a completion, which is learned; nothing is put between the two."""

    def __init__(self, prompt_field: str, completion_field: str) -> None:
        self.columns = [prompt_field, completion_field]

    def document(self, row: Row, place: object) -> Document:
        prompt = _text(row, self.columns[0], "prompt_field", place)
        completion = _text(row, self.columns[1], "completion_field", place)
        if not completion:
            raise ValueError(f"{place}: column {self.columns[1]!r} is empty, so there is nothing to learn: remove it")
        text = prompt + completion
        return Document(text, text, ((len(prompt), len(text)),))

    def fingerprint(self) -> object:
        return ["completion", *self.columns]


class ChatRows:
    """
    A list of messages, each with "role" and "content", in the words of the tokenizer's chat template.

    Learned is what the assistant says: what the template marks with {% generation %}, or else what each of its
    messages adds to the conversation before it, prompt for it included.

    Raises:
        ValueError: if there is no template.
    """

    def __init__(self, name: str, field: str, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self.columns = [field]
        if tokenizer is None:
            raise ValueError(
                f"source {name!r}: format 'chat' needs a tokenizer with a chat template: give tokenizer.name"
            )
        try:
            self._template: str = tokenizer.get_chat_template()
        except ValueError:
            raise ValueError(
                f"source {name!r}: format 'chat' needs a chat template, and the tokenizer {tokenizer.name_or_path!r} "
                "has none: choose one that has, or put chat_template.jinja beside it"
            ) from None
        self._special_tokens = tokenizer.special_tokens_map
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None

    def document(self, row: Row, place: object) -> Document:
        messages = self._messages(row, place)
        try:
            text, learned = self._render_marked(messages) if self._marked else self._render(messages, place)
        except TemplateError as error:
            raise ValueError(f"{place}: the chat template refuses this conversation: {error}") from None
        if not learned:
            raise ValueError(f"{place}: the chat template marks nothing of this conversation with {{% generation %}}")
        return Document(text, text, tuple(learned))

    def fingerprint(self) -> object:
        return ["chat", self.columns[0], self._template, self._special_tokens]

    def _messages(self, row: Row, place: object) -> list[Row]:
        (field,) = self.columns
        _require_column(row, field, "messages_field", place)
        messages = row[field]
        sound = isinstance(messages, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
            for m in messages
        )
        if not sound or not messages:
            raise ValueError(
                f"{place}: column {field!r} must hold a list of messages, each with a role and a content that are "
                f"text, got {messages!r:.80}"
            )
        if messages[0]["role"] == "assistant":
            raise ValueError(f"{place}: the conversation begins with the assistant: put what it answers to before it")
        if not any(message["role"] == "assistant" and message["content"] for message in messages):
            raise ValueError(f"{place}: the assistant says nothing, so there is nothing to learn: remove it")
        return messages

    def _render_marked(self, messages: list[Row]) -> tuple[str, list[Span]]:
        texts, spans = self._rendered(messages, return_assistant_tokens_mask=True)
        return texts[0], [(start, end) for start, end in spans[0] if start < end]

    def _render(self, messages: list[Row], place: object) -> tuple[str, list[Span]]:
        text = self._text(messages)
        learned: list[Span] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], add_generation_prompt=True)
            after = self._text(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"{place}: the chat template writes the beginning of a conversation otherwise once it goes on, so "
                    "what the assistant says cannot be told by itself: mark it with {% generation %} in the template"
                )
            learned.append((len(before), len(after)))
        return text, learned

    def _text(self, messages: list[Row], **options: Any) -> str:
        return self._rendered(messages, **options)[0][0]

    def _rendered(self, messages: list[Row], **options: Any) -> tuple[list[str], list[list[Span]]]:
        return render_jinja_template([messages], chat_template=self._template, **options, **self._special_tokens)


def _require_column(columns: Iterable[str], field: str, option: str, place: object) -> None:
    """
    Raises:
        ValueError: if there is no such column; names the option that chooses one.
    """
    if field not in columns:
        raise ValueError(f"{place}: no column {field!r}; set {option} to one of {sorted(columns)}")


def _text(row: Row, field: str, option: str, place: object) -> str:
    _require_column(row, field, option, place)
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{place}: column {field!r} must hold text, got {type(text).__name__} {text!r:.50}")
    return text or ""
