"""Memory of a piece of a program, peak and course: the allocator's on a GPU, the resident set's on a CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

# glibc gives freed memory back at once, so that the resident set is what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def is_exact(device: torch.device) -> bool:
    """Whether the memory that is measured is what is in use: on a CPU only if the process began with `ENVIRONMENT`."""
    return device.type != "cpu" or ENVIRONMENT.items() <= os.environ.items()


class PeakMemory:
    """Bytes above the level at `start`, at the highest point since.

    On the CPU the kernel's high-water mark is used (Linux). glibc returns freed memory late; start Python with
    `ENVIRONMENT` to see what is really in use. What it keeps of small blocks all the same does not count where it can
    be told: not at `start`, nor as `current`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = 0

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.base = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.base = _in_use()

    def current(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.base
        return _in_use() - self.base

    def peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return _status("VmHWM") - self.base


class StepMemory:
    """What the steps of a training run need over weights and data: states of the optimizer, gradients, activations."""

    def __init__(self, device: torch.device, optimizer: torch.optim.Optimizer) -> None:
        self._memory, self._optimizer = PeakMemory(device), optimizer
        self._saved: list[int] = []
        self._peaks: list[int] = []

    def begin(self) -> None:
        """Before the forward, when there are no gradients."""
        self._states = _state_bytes(self._optimizer)
        self._memory.start()

    def after_forward(self) -> None:
        self._saved.append(self._memory.current())

    def end(self) -> None:
        """After the optimizer's step, before its gradients are dropped."""
        self._peaks.append(self._states + self._memory.peak())

    def result(self) -> dict[str, int]:
        """saved_bytes: the median after a forward; peak_bytes: the largest; without the first step, which compiles."""
        saved, peaks = self._saved[1:] or self._saved, self._peaks[1:] or self._peaks
        return {"saved_bytes": int(statistics.median(saved)), "peak_bytes": max(peaks)}


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


class MemoryTimeline:
    """Memory over time while a `with` block runs, looked at every few milliseconds from a thread.

    Attributes:
        samples: (seconds since the beginning, bytes above the level then).
        marks: (seconds since the beginning, a name), of what `mark` was called for.
    """

    def __init__(self, device: torch.device, interval: float = 0.003) -> None:
        self.samples: list[tuple[float, int]] = []
        self.marks: list[tuple[float, str]] = []
        self._memory, self._interval, self._over = PeakMemory(device), interval, threading.Event()

    def __enter__(self) -> MemoryTimeline:
        self._memory.start()
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()  # a block that is over before the thread looked has a sample all the same

    def mark(self, name: str) -> None:
        self.marks.append((time.perf_counter() - self._begin, name))

    def _watch(self) -> None:
        while not self._over.wait(self._interval):
            self._look()

    def _look(self) -> None:
        self.samples.append((time.perf_counter() - self._begin, self._memory.current()))


class _MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: bytes, but for three counts."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _in_use() -> int:
    """Resident bytes, without what glibc (2.33 or newer) holds for small blocks to come."""
    mallinfo = _mallinfo()
    return _status("VmRSS") - (mallinfo().fordblks if mallinfo else 0)


@functools.cache
def _mallinfo() -> Callable[[], _MallInfo] | None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _MallInfo
    return libc.mallinfo2


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
