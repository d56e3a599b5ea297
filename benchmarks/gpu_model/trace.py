"""What the simulator writes down of a step, and what it adds up to on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        live: bytes of activations, gradients and temporaries while it runs; weights and inputs are not among them.
    """

    kind: str
    name: str
    nbytes: float
    flops: float
    half: bool
    live: int

    def seconds(self, device: Device, precision: str) -> float:
        """The roofline: the longest of moving the bytes, computing the product and starting the kernel."""
        if self.kind == "gate":
            return 0.0
        product = self.flops / device.flops["bf16" if self.half else precision]
        return max(self.nbytes / device.bandwidth, product, device.launch_seconds)


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
            "kernels": sum(op.kind not in ("gate", "mm", "attention", "convolution") for op in ops),
            "host_calls": len(ops),
        }


def at_depth(shallow: float, deep: float, between: int, beyond: int) -> float:
    """A figure that is affine in the number of layers, `beyond` layers past `deep`, which has `between` more than
    `shallow`."""
    return deep + (deep - shallow) * beyond / between


def peak_at_depth(shallow: Trace, deep: Trace, between: int, beyond: int) -> float:
    """The peak of a deeper model, from two traces.

    What is alive at an operation is affine in the number of layers, for the operations that both traces begin with (in
    the backward the head and the last layers) and for those that they end with. In the layers between it lies between.
    """
    found = []
    for name in ("forward", "backward"):
        less, more = getattr(shallow, name), getattr(deep, name)
        half = len(less) // 2
        pairs = [*zip(less[:half], more[:half], strict=True), *zip(less[half:], more[len(more) - len(less) + half :], strict=True)]
        found += [at_depth(a.live, b.live, between, beyond) for a, b in pairs]
    return max(found)
