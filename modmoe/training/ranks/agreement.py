"""What all ranks of a run must have in common."""

import functools
import hashlib
from collections import defaultdict
from pathlib import Path

import modmoe
from modmoe.data import PreparedData
from modmoe.training.checkpoints.output_dir import versions
from modmoe.training.errors import ConfigError
from modmoe.training.ranks.team import Team
from modmoe.training.run_config import RunConfig
from modmoe.training.yaml_config import flatten

_MAY_DIFFER = ("data.cache_dir", "data.workers")
_SOURCE = ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")


def run_fingerprint(run: RunConfig) -> dict[str, str]:
    """Configuration, versions and source code, each under a key that its user can look up."""
    config = {key: repr(value) for key, value in flatten(run.model_dump(mode="json")).items()}
    return {
        **{key: value for key, value in config.items() if key not in _MAY_DIFFER},
        **{f"version of {name}": version for name, version in versions().items()},
        "source code of modmoe": source_digest(),
    }


def data_fingerprint(data: PreparedData) -> dict[str, str]:
    """Vocabulary and sizes of the prepared text."""
    vocabulary = hashlib.sha256(repr(sorted(data.tokenizer.get_vocab().items())).encode())
    sizes = {name: domain.train.tokens for name, domain in data.statistics.items() if domain.train}
    return {
        "vocabulary": f"{len(data.tokenizer)} tokens, {vocabulary.hexdigest()[:12]}",
        **{f"training tokens of {name}": str(tokens) for name, tokens in sizes.items()},
    }


@functools.cache
def source_digest() -> str:
    """Digest of this package's own files, kernels included."""
    package = Path(modmoe.__file__).parent
    roots = [root for root in (package, package.parent / "csrc") if root.is_dir()]
    digest = hashlib.sha256()
    for path in sorted(path for root in roots for pattern in _SOURCE for path in root.rglob(pattern)):
        digest.update(str(path.relative_to(package.parent)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_agreement(team: Team, name: str, mine: dict[str, str], seconds: float) -> None:
    """
    Raises:
        ConfigError: on all ranks, if they do not have the same; names keys, values and ranks.
    """
    everyone = team.gather(name, mine, seconds)
    keys = sorted({key for facts in everyone for key in facts})
    differing = []
    for key in keys:
        holders = defaultdict(list)
        for rank, facts in enumerate(everyone):
            holders[facts.get(key, "missing")].append(rank)
        if len(holders) > 1:
            differing.append(f"{key} is {_describe(holders)}")
    if differing:
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"ranks do not agree before training: {'; '.join(differing[:5])}{more}. Start all of them with the same "
            "command, files and versions"
        )


def _describe(holders: dict[str, list[int]]) -> str:
    """The most common value last: the others are the ones to look at."""
    by_number = sorted(holders.items(), key=lambda item: len(item[1]))
    return " and ".join(f"{value} on {_ranks(ranks)}" for value, ranks in by_number)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return f"rank {shown}" if len(ranks) == 1 else f"{len(ranks)} ranks ({shown}{', ...' if len(ranks) > 4 else ''})"
