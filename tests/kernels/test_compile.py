"""The CUDA sources compile for every architecture, within a recorded number of registers and without spills.

After a change that is meant: `python -m tests.kernels.test_compile FOLDER` writes ceilings.json anew.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modmoe.ops import build

from .emulated import CUDA, HERE

CEILINGS = HERE / "ceilings.json"
ARCHS = ("80", "90a", "100")
SLACK = 4  # registers: versions of ptxas differ a little

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
]


def compile_for(source: Path, arch: str, folder: Path) -> dict[str, tuple[int, int]]:
    """Return registers and spilled bytes of each kernel, by its mangled name."""
    command = next(command for file, command in build._cuda_plan().objects if file == source)
    flags = [flag for flag in command if flag != "-gencode" and not flag.startswith("arch=")]
    target = ["-gencode", f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]", "-Xptxas", "-v"]
    result = subprocess.run(
        [*flags, *target, "-c", str(source), "-o", str(folder / "object.o")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    kernels = {}
    for part in result.stderr.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        registers = re.search(r"Used (\d+) registers", part)
        assert registers, part
        kernels[name] = (int(registers[1]), spills)
    return kernels


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["routing", "grouped_linear", "device"])
def test_registers_and_spills(name: str, arch: str, tmp_path: Path) -> None:
    kernels = compile_for(CUDA / f"{name}.cu", arch, tmp_path)
    ceilings = json.loads(CEILINGS.read_text())[arch][name]
    assert kernels.keys() == ceilings.keys()
    for kernel, (registers, spills) in kernels.items():
        assert spills == 0, kernel
        assert registers <= ceilings[kernel] + SLACK, kernel


def test_hopper_products(tmp_path: Path) -> None:
    source = CUDA / "grouped_linear_sm90.cu"
    if build._cutlass_include() is None:
        pytest.skip("no CUTLASS headers: pip install --no-deps nvidia-cutlass")
    kernels = compile_for(source, "90a", tmp_path)
    assert len(kernels) == 12  # two dtypes, three products, and what prepares each
    assert all(spills == 0 for _, spills in kernels.values())


def main() -> None:
    ceilings: dict[str, dict[str, dict[str, int]]] = {}
    for arch in ARCHS:
        for name in ("routing", "grouped_linear", "device"):
            kernels = compile_for(CUDA / f"{name}.cu", arch, Path(sys.argv[1]))
            ceilings.setdefault(arch, {})[name] = {kernel: registers for kernel, (registers, _) in kernels.items()}
    CEILINGS.write_text(json.dumps(ceilings, indent=1) + "\n")


if __name__ == "__main__":
    main()
