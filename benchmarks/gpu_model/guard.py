"""Builds and loads guard.cpp, without which torch's CPU build knows no fake CUDA tensor in autograd."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TORCH, TRITON = "2.13.0", "3.7.1"
_SOURCE = Path(__file__).with_name("guard.cpp")


class ToolError(Exception):
    """This machine, or this process, cannot generate a GPU's code; the message says why, and what would help."""


def reason_against() -> str:
    """Why this machine cannot do it, `""` if it can. Imports neither torch nor Triton."""
    if sys.platform != "linux":
        return f"a GPU's code is generated on Linux, not on {sys.platform}"
    for package, wanted in (("torch", TORCH), ("triton", TRITON)):
        try:
            found = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: pip install '.[gpu-codegen]'"
        if found != wanted:
            return f"private names of {package} {wanted} are used, found {found}: pip install {package}=={wanted}"
    if re.search(r"^cuda.*= '", (_torch_path() / "version.py").read_text(), re.M):
        return "a CPU build of torch is needed: that for CUDA brings its own guard"
    return "" if shutil.which("g++") else "g++ is not on the path"


def load() -> None:
    """For the rest of the process. The library is built once and kept in a folder for temporary files.

    Raises:
        ToolError: the machine cannot do it, or torch is imported already.
    """
    if reason := reason_against():
        raise ToolError(reason)
    if "torch" in sys.modules:
        raise ToolError("torch is imported already: load the guard at the start of a process")
    torch_path = _torch_path()
    library = _built(torch_path)
    ctypes.CDLL(str(torch_path / "lib" / "libtorch_cpu.so"), os.RTLD_GLOBAL | os.RTLD_NOW)
    ctypes.CDLL(str(library))


def _torch_path() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _built(torch_path: Path) -> Path:
    folder = Path(tempfile.gettempdir()) / f"slimfit_fx_gpu_model_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ToolError(f"{folder} belongs to somebody else: remove it, or set TMPDIR")
    key = hashlib.sha256(_SOURCE.read_bytes() + str(torch_path).encode() + TORCH.encode()).hexdigest()[:16]
    library = folder / f"guard-{key}.so"
    if not library.exists():
        new = library.with_suffix(f".{os.getpid()}")
        paths = [f"-I{torch_path}/include", f"-L{torch_path}/lib"]
        command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *paths, str(_SOURCE), "-o", str(new)]
        built = subprocess.run([*command, "-lc10", "-ltorch_cpu"], capture_output=True, text=True, check=False)
        if built.returncode:
            raise ToolError(f"g++ cannot build {_SOURCE.name}:\n{built.stderr[-2000:]}")
        new.replace(library)  # at once: another process may build the same
    return library
