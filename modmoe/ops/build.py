"""The compiled kernels: built from csrc/ on first use, kept in a cache, and never needed.

One library holds the CPU kernels and one the CUDA kernels. Both use the stable ABI of libtorch and no Python headers,
so that a library serves every torch from 2.10 on and every Python. Several processes may build at once: each builds in
a folder of its own and moves the result into place in one step.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Kind = Literal["cpu", "cuda"]

CACHE_VARIABLE = "MODMOE_CACHE"
ARCHS_VARIABLE = "MODMOE_CUDA_ARCHS"
DEFAULT_ARCHS = ("80", "90a", "100")
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # torch 2.10's
_TIMEOUT = 900  # seconds, for one call of a compiler


class BuildError(RuntimeError):
    """The kernels could not be built; the message says why in one sentence."""


@functools.cache
def library_problem(kind: Kind) -> str | None:
    """Load the kernels, building them if they are not in the cache. Done once per process.

    Returns:
        None if they are ready, else one sentence that says why not.
    """
    if kind == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.ops.load_library(str(library(kind)))
    except BuildError as error:
        return str(error)
    except OSError as error:
        # torch names the file alone; what was wrong with it is the cause.
        return f"the {kind} kernels were built but do not load ({_one_line(str(error.__cause__ or error))})"
    return None


def cpu_problem(x: torch.Tensor) -> str | None:
    """Say why the kernels of csrc/cpu cannot run on such tensors here; None if they can."""
    if x.device.type != "cpu":
        return f"it is for the CPU, the tensors are on {x.device.type!r}"
    return library_problem("cpu")


def library(kind: Kind) -> Path:
    """Return the path of a library that is whole and made from the present sources, building it if there is none.

    Raises:
        BuildError: no sources, no compiler, a compiler that fails, or a cache that cannot be written.
    """
    plan = _cpu_plan() if kind == "cpu" else _cuda_plan()
    path = cache_directory() / f"modmoe-{kind}-{plan.fingerprint()}.so"
    if _is_whole(path):
        return path
    logger.warning("building the %s kernels of modmoe, once: %s", kind, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            built = plan.compile(Path(scratch))
            with built.open("ab") as file:
                file.write(hashlib.sha256(built.read_bytes()).digest())
            os.replace(built, path)
    except OSError as error:
        raise BuildError(
            f"the cache {path.parent} cannot be written ({error.strerror}); set {CACHE_VARIABLE} to another folder"
        ) from error
    return path


def cache_directory() -> Path:
    """Return the folder of built libraries: MODMOE_CACHE, else modmoe in the user's cache folder.

    Raises:
        BuildError: the user has no home folder.
    """
    folder = os.environ.get(CACHE_VARIABLE) or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "modmoe")
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:  # a user without a home, as containers have them
        raise BuildError(f"there is no home folder for {folder}: set {CACHE_VARIABLE} to a folder") from error


def source_directory(kind: Kind) -> Path:
    """Return csrc/<kind>, from inside the installed package or from beside it in a checkout.

    Raises:
        BuildError: it is in neither place.
    """
    package = Path(__file__).parents[1]
    for csrc in (package / "csrc", package.parent / "csrc"):
        if (csrc / kind).is_dir():
            return csrc / kind
    raise BuildError(f"there is no csrc/{kind} in {package} or beside it: install modmoe again")


def _is_whole(path: Path) -> bool:
    """The last 32 bytes are the digest of the others: loading half a library could kill the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@dataclass(frozen=True)
class _Plan:
    """How to build one library: a command for each source, and one that links."""

    compilers: tuple[str, ...]
    objects: tuple[tuple[Path, tuple[str, ...]], ...]
    link: tuple[str, ...]
    headers: tuple[Path, ...]
    target: str

    def fingerprint(self) -> str:
        """Everything that the result depends on: sources, commands, compilers, torch and the processor it is for."""
        digest = hashlib.sha256(repr((self.link, self.target, torch.__version__)).encode())
        for compiler in self.compilers:
            digest.update(_run([compiler, "--version"]).encode())
        for file, command in self.objects:
            digest.update(repr(command).encode() + file.read_bytes())
        for file in self.headers:
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:16]

    def compile(self, scratch: Path) -> Path:
        objects = [str(scratch / f"{source.name}.o") for source, _ in self.objects]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            commands = (
                [*command, "-c", str(source), "-o", out]
                for (source, command), out in zip(self.objects, objects, strict=True)
            )
            list(pool.map(_run, commands))
        result = scratch / "library.so"
        _run([*self.link, "-shared", "-o", str(result), *objects, *_torch_libraries()])
        return result


def _cpu_plan() -> _Plan:
    compiler = _cxx()
    sources = source_directory("cpu")
    command = (compiler, "-O3", *_native(compiler), "-fPIC", "-fvisibility=hidden", *_common_flags())
    return _Plan(
        compilers=(compiler,),
        objects=tuple((source, command) for source in sorted(sources.glob("*.cpp"))),
        link=(compiler,),
        headers=tuple(sorted(sources.glob("*.h"))),
        target=_processor(),
    )


def _cuda_plan() -> _Plan:
    nvcc, compiler = _nvcc(), _cxx()
    sources = source_directory("cuda")
    host = ("-ccbin", compiler, "-Xcompiler", "-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", "-t0")
    command = (nvcc, "-O3", "-DNDEBUG", *host, *_common_flags())
    archs = cuda_archs()
    objects, headers = [], [*sources.glob("*.cuh"), *sources.glob("*.h")]
    for source in sorted(sources.glob("*.cu")):
        if source.stem.endswith("_sm90"):
            include = _cutlass_include()
            if "90a" in archs and include:
                objects.append((source, (*command, f"-I{include}", *_gencode("90a"))))
                headers.append(Path(include) / "cutlass" / "version.h")  # of all of CUTLASS, the part that changes
        else:
            objects.append((source, (*command, *(flag for arch in archs for flag in _gencode(arch)))))
    return _Plan(
        compilers=(nvcc, compiler),
        objects=tuple(objects),
        link=(nvcc, "-cudart", "static", "-ccbin", compiler),
        headers=tuple(sorted(headers)),
        target=",".join(archs),
    )


def cuda_archs() -> tuple[str, ...]:
    """Return the architectures to build for: MODMOE_CUDA_ARCHS ("80,90a"), else this machine's, else all known."""
    if archs := os.environ.get(ARCHS_VARIABLE):
        return tuple(arch.strip() for arch in archs.split(","))
    if not torch.cuda.is_available():
        return DEFAULT_ARCHS
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    # Older cards have no asynchronous copies and no bfloat16: nothing would compile for them.
    own = {f"{major}{minor}" for major, minor in cards if major >= 8} & _known_archs()
    return tuple(sorted({"80"} | {arch + ("a" if int(arch) >= 90 else "") for arch in own}))


def _known_archs() -> set[str]:
    """Those that this nvcc can compile for; newer cards run the intermediate code of 80."""
    return set(re.findall(r"compute_(\d+)$", _run([_nvcc(), "--list-gpu-arch"]), re.MULTILINE))


def _gencode(arch: str) -> tuple[str, ...]:
    # The intermediate code of 80 is what a card that has no code of its own falls back to.
    code = f"[sm_{arch},compute_{arch}]" if arch == "80" else f"sm_{arch}"
    return ("-gencode", f"arch=compute_{arch},code={code}")


def _cutlass_include() -> str | None:
    """The headers that the wheel nvidia-cutlass brings, or None."""
    spec = importlib.util.find_spec("cutlass_library")
    folders = [Path(place) / "source" / "include" for place in (spec and spec.submodule_search_locations) or []]
    return next((str(folder) for folder in folders if folder.is_dir()), None)


def _cxx() -> str:
    wished = os.environ.get("CXX")
    found = shutil.which(wished) if wished else shutil.which("g++") or shutil.which("clang++")
    if not found:
        raise BuildError(
            f"CXX={wished!r} is not a program" if wished else "there is no C++ compiler: install g++ or set CXX"
        )
    return found


def _nvcc() -> str:
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    found = next((path for home in homes if (path := shutil.which("nvcc", path=f"{home}/bin"))), None)
    found = found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise BuildError("there is no nvcc: install the CUDA toolkit or set CUDA_HOME")
    return found


@functools.cache
def _native(compiler: str) -> tuple[str, ...]:
    """The flag that makes use of all that this processor has, if the compiler knows it."""
    for flag in ("-march=native", "-mcpu=native"):
        try:
            _run([compiler, flag, "-x", "c++", "-fsyntax-only", "/dev/null"])
            return (flag,)
        except BuildError:
            continue
    return ()


def _processor() -> str:
    """What tells processors apart that need different code: a cache may be shared by several machines."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {features}"


def _common_flags() -> tuple[str, ...]:
    return ("-std=c++17", _STABLE_ABI, "-DTORCH_STABLE_ONLY", f"-I{Path(torch.__file__).parent / 'include'}")


def _torch_libraries() -> tuple[str, ...]:
    return (f"-L{Path(torch.__file__).parent / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch", "-ltorch_cpu")


def _run(command: list[str]) -> str:
    name = Path(command[0]).name
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",  # compilers quote sources and paths, in whatever encoding those are
            env={**os.environ, "LC_ALL": "C"},
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{name} was still running after {_TIMEOUT} s") from error
    except OSError as error:
        raise BuildError(f"{name} cannot be started ({error.strerror})") from error
    if result.returncode < 0:
        raise BuildError(f"{name} was killed by signal {-result.returncode}; is there enough memory?")
    if result.returncode:
        logger.debug("%s\n%s", " ".join(command), result.stderr)
        raise BuildError(f"{name} failed with exit status {result.returncode} ({_one_line(result.stderr)})")
    return result.stdout


def _one_line(text: str) -> str:
    """The line of a compiler's output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])[:300]
