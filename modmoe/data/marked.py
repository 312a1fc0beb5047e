"""Tokenising documents of which only parts are to be predicted."""

import numpy as np
from transformers import PreTrainedTokenizerFast

from .documents import Document
from .packing import FIRST, LEARNED, marked_example
from .sources import stable_hash
from .tokenizer import DocumentEncoder


class MarkedEncoder(DocumentEncoder):
    """Turns documents into token ids with marks (`packing.LEARNED`, `packing.FIRST`).

    Parts are encoded one by one: a prompt has exactly the tokens that it has at inference, and no token belongs
    to both sides. An end-of-sequence token to be predicted is added, unless the last learned part has one.

    Args:
        tokenizer: a fast tokenizer with an end-of-sequence token.
        reads_special_tokens: whether text that spells a special token is one, as in conversations that a chat
            template has written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, reads_special_tokens: bool) -> None:
        super().__init__(tokenizer)
        self._backend.encode_special_tokens = not reads_special_tokens
        self.dtype = np.dtype(np.uint32)
        self.fingerprint = stable_hash([self.fingerprint, "marked", reads_special_tokens])
        self.make_example = marked_example

    def encode_documents(self, documents: list[Document]) -> list[np.ndarray]:
        segments = [list(document.segments()) for document in documents]
        texts = [text for parts in segments for text, _ in parts]
        encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        return [self._marked([(next(encodings).ids, learned) for _, learned in parts]) for parts in segments]

    def num_learned(self, tokens: np.ndarray) -> int:
        return int(np.count_nonzero(tokens & LEARNED))

    def _marked(self, parts: list[tuple[list[int], bool]]) -> np.ndarray:
        arrays = [np.array(ids, dtype=self.dtype) | (LEARNED if learned else np.uint32(0)) for ids, learned in parts]
        said = [ids for ids, learned in parts if learned]
        if self.eos_token_id not in said[-1]:
            arrays.append(np.array([self.eos_token_id], dtype=self.dtype) | LEARNED)
        tokens = np.concatenate(arrays)
        tokens[0] |= FIRST
        return tokens
