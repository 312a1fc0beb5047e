"""Reading YAML files and command-line overrides into plain dicts, with one clear sentence per mistake."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from modmoe.training.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 3e-4 is a number, and a key given twice is a mistake."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Later, merge keys (<<: *other) have added what may be given again.
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, key.value) for key, _ in node.value]
        for tag, name in keys:
            if keys.count((tag, name)) > 1:
                raise yaml.composer.ComposerError(None, None, f"key {name!r} is given twice", node.start_mark)
        return node


# YAML 1.1, which PyYAML speaks, wants a dot and a signed exponent in floats.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: Path) -> dict[str, Any]:
    """
    Read one YAML (or JSON) file that holds a mapping.

    Raises:
        ConfigError: if the file is missing, empty, not YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    if path.suffix == ".json":
        text = text.expandtabs()  # JSON may be indented by tabs, YAML may not
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise ConfigError(f"config file {path} is empty")
    if not isinstance(content, dict):
        raise ConfigError(
            f"config file {path} must hold sections such as 'data:', but holds a {type(content).__name__}"
        )
    return content


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """
    Turn `--a.b.c VALUE` and `--a.b.c=VALUE` into (key, value) pairs; values are read as YAML.

    Raises:
        ConfigError: for anything else, and for a key without a value.
    """
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}: overrides look like --optimization.steps 100")
        key, has_value, text = argument[2:].partition("=")
        if not has_value:
            if not rest:
                raise ConfigError(f"override {argument} has no value")
            text = rest.pop(0)
        try:
            overrides.append((key, yaml.load(text, Loader=_Loader)))
        except yaml.YAMLError:
            raise ConfigError(f"override {argument}: {text!r} is not a YAML value") from None
    return overrides


def apply_override(content: dict[str, Any], key: str, value: Any) -> None:
    """
    Set one dotted key in nested dicts and lists, in place; missing sections are made.

    Raises:
        ConfigError: if the path leads through a plain value or past the end of a list.
    """
    *path, last = key.split(".")
    node: Any = content
    for depth, part in enumerate(path):
        node = _step_into(node, part, key, ".".join(path[: depth + 1]))
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _step_into(node: Any, part: str, key: str, prefix: str) -> Any:
    if isinstance(node, list):
        child = node[_index(node, part, key)]
    else:
        if node.get(part) is None:
            node[part] = {}
        child = node[part]
    if not isinstance(child, dict | list):
        raise ConfigError(f"override --{key}: {prefix} is the value {child!r}, not a section")
    return child


def _index(node: list, part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(f"override --{key}: {part!r} must be a number from 0 to {len(node) - 1}")
    return int(part)


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict from dotted keys to plain values."""
    if isinstance(content, dict) and content:
        items: Any = content.items()
    elif isinstance(content, list) and content:
        items = enumerate(content)
    else:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for name, child in items:
        flat |= flatten(child, f"{prefix}.{name}" if prefix else str(name))
    return flat
