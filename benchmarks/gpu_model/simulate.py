"""Runs generated modules on fake tensors: what a step reads, writes, computes and holds, without a device.

Every buffer of the generated code is a fake CUDA tensor, freed where the code frees it: the peak is that of an
allocator without fragmentation, in blocks of 512 bytes. Kernels do not run. They are taken to read and write each
tensor that they are given once, in-place arguments twice, lookup tables no more than there are results. A gate that is
open in a tenth of the steps counts as a tenth of its rows, bytes and FLOPs: figures are means over the open sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from .generate import Pair
from .machine import Machine, nbytes, sandbox
from .trace import Trace

_ARGUMENTS = re.compile(r"\n\s+([\w, ]+?),? = args\n")
_EXAMPLE = re.compile(r"^\s+(\w+) = \w+\((\([^)]*\)), (\([^)]*\)), device='(\w+)[^']*', dtype=torch\.(\w+)", re.M)


def simulate(pair: Pair, freeze_rate: float = 0.0) -> Trace:
    """The trace of one forward and backward.

    Args:
        pair: static shapes.
        freeze_rate: how often a gate is closed, of the layers that do not always train.
    """
    fractions = [1.0 if always else 1.0 - freeze_rate for always in pair.open]
    trace = Trace()
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = examples(pair.forward.source)
        machine = Machine(fractions, held=arguments)
        results = run(pair.forward.source, machine, list(arguments))
        trace.forward = machine.take()
        names = argument_names(pair.backward.source)
        tangents = sum("tangents" in name for name in names)
        outputs = len(results) - (len(names) - tangents)
        saved = results[outputs:]
        del results
        trace.saved = machine.memory.look()
        backward_arguments = [*saved, *examples(pair.backward.source, "tangents")]
        del saved
        gradients = run(pair.backward.source, machine, backward_arguments)
        trace.backward = machine.take()
        trace.gradients = sum(nbytes(x) for x in gradients if isinstance(x, Tensor))
    return trace


def run(source: str, machine: Machine, arguments: list[Any]) -> list[Any]:
    """What a generated module returns on a machine, for fake tensors."""
    with sandbox(machine):
        call = _load(source)
        with machine:
            return list(call(arguments))


def _load(source: str) -> Any:
    """The module's function, without its checks of sizes: fake tensors of gated rows have others."""
    source = re.sub(r"^.*copy_if_misaligned.*$", "", source, flags=re.M)
    source = re.sub(r"^\s+assert_(size_stride|alignment)\(.*$", "", source, flags=re.M)
    source = re.sub(r"^\s+if not \(.*u\d+.*\):\n\s+raise .*$", "", source, flags=re.M)
    scope: dict[str, Any] = {"__name__": "simulated", "__file__": "simulated.py"}
    exec(compile(source, "simulated.py", "exec"), scope)
    return scope["call"]


def argument_names(source: str) -> list[str]:
    found = _ARGUMENTS.search(source)
    assert found is not None, "the generated module takes its arguments in another way"
    return found.group(1).split(", ")


def examples(source: str, only: str = "", device: str = "") -> list[Tensor]:
    """A module's arguments, or those with `only` in their names, from the benchmark that Inductor writes below it.

    They are empty, on their own device if none is given.
    """
    made = {name: rest for name, *rest in _EXAMPLE.findall(source)}
    return [_empty(made[name], device) for name in argument_names(source) if only in name]


def _empty(example: Sequence[str], device: str) -> Tensor:
    size, stride, own, dtype = example
    sizes = [[int(number) for number in re.findall(r"\d+", text)] for text in (size, stride)]
    return torch.empty_strided(*sizes, dtype=getattr(torch, dtype), device=device or own)
