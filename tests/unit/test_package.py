"""What a wheel holds is listed by hand in pyproject.toml, because csrc/ lies outside the package."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    python = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "modmoe").rglob("__init__.py")}
    kernels = {f"modmoe.csrc.{p.name}" for p in (ROOT / "csrc").iterdir() if p.is_dir()}
    assert set(listed) == python | kernels
