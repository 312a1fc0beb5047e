"""Training data: documents from embedded, local and hub sources, tokenised once and packed into blocks."""

from .config import SourceConfig, TokenizerConfig
from .dataset import PackedDataset, PackedStream
from .embedded import EMBEDDED_DOMAINS
from .mixture import MixtureDataset, StreamingMixture
from .packing import collate_packed
from .prepare import PreparedData, prepare_data
from .statistics import DomainStatistics, SplitStatistics, byte_unigram_entropy, gzip_bits_per_byte
from .tokenizer import train_bpe

__all__ = [
    "EMBEDDED_DOMAINS",
    "DomainStatistics",
    "MixtureDataset",
    "PackedDataset",
    "PackedStream",
    "PreparedData",
    "SourceConfig",
    "SplitStatistics",
    "StreamingMixture",
    "TokenizerConfig",
    "byte_unigram_entropy",
    "collate_packed",
    "gzip_bits_per_byte",
    "prepare_data",
    "train_bpe",
]
