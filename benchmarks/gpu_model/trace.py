"""What the simulator writes down of a step, and what it adds up to on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .devices import Device

PRODUCTS = frozenset({"mm", "attention", "convolution"})  # by libraries; everything else moves bytes


@dataclass(frozen=True)
class Op:
    """One call that the host makes.

    Attributes:
        kind: "triton", "mm", "attention", "convolution", "copy", "scatter", "aten", or "gate" for an operator of ours
            that starts no kernel.
        name: of the kernel or the operator.
        nbytes: read and written in the device's memory.
        flops: of matrix products, two for each multiplication with its addition.
        half: whether the product's operands are bf16 or fp16.
        part: of the steps in which it runs; the other figures are means over all steps.
        live: bytes of activations, gradients and temporaries while it runs; weights and inputs are not among them.
    """

    kind: str
    name: str
    nbytes: float
    flops: float
    half: bool
    live: int
    part: float = 1.0

    def seconds(self, device: Device, precision: str) -> float:
        """The roofline: the longest of moving the bytes, computing the product and starting the kernel."""
        if self.kind == "gate":
            return 0.0
        product = self.flops / device.flops["bf16" if self.half else precision]
        return max(self.nbytes / device.bandwidth, product, self.part * device.launch_seconds)


@dataclass
class Trace:
    """A step: the operations of its forward and of its backward.

    Attributes:
        saved: bytes that are alive between the two.
        gradients: bytes of gradients that the backward hands out.
    """

    forward: list[Op] = field(default_factory=list)
    backward: list[Op] = field(default_factory=list)
    saved: int = 0
    gradients: int = 0

    @property
    def peak(self) -> int:
        """The most bytes that are alive at once."""
        return max(op.live for op in (*self.forward, *self.backward))

    def figures(self, device: Device, precision: str) -> dict[str, float]:
        """Sums, each affine in the number of layers; `precision` of products of fp32 tensors: "fp32" or "tf32"."""
        ops = [*self.forward, *self.backward]
        return {
            "saved_bytes": self.saved,
            "gradient_bytes": self.gradients,
            "kernel_traffic": sum(op.nbytes for op in ops if op.kind not in PRODUCTS),
            "product_traffic": sum(op.nbytes for op in ops if op.kind in PRODUCTS),
            "flops": sum(op.flops for op in ops),
            "forward_seconds": sum(op.seconds(device, precision) for op in self.forward),
            "backward_seconds": sum(op.seconds(device, precision) for op in self.backward),
            "kernels": sum(op.part for op in ops if op.kind != "gate" and op.kind not in PRODUCTS),
            "host_calls": sum(op.part for op in ops),
        }


def at_depth(shallow: float, deep: float, between: int, beyond: int) -> float:
    """A figure that is affine in the number of layers, `beyond` layers past `deep`, which has `between` more than
    `shallow`."""
    return deep + (deep - shallow) * beyond / between


def peak_at_depth(shallow: Trace, deep: Trace, between: int, beyond: int) -> float:
    """The peak of a deeper model, from two traces.

    A layer more below adds what it saves to all that is alive from the end of the forward until its own backward, and
    behind that the gradients of its weights. So the peak lies at an end of the backward, whatever is between.
    """
    saved = (deep.saved - shallow.saved) * beyond / between
    gradients = (deep.gradients - shallow.gradients) * beyond / between
    fore, back = len(deep.forward) // 2, len(deep.backward) // 2
    return max(
        _peak(deep.forward[:fore]),
        _peak(deep.forward[fore:]) + saved,
        _peak(deep.backward[:back]) + saved,
        _peak(deep.backward[back:]) + gradients,
    )


def _peak(ops: Sequence[Op]) -> int:
    return max(op.live for op in ops)
