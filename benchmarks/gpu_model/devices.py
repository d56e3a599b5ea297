"""The GPUs that code is generated for and whose roofline is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(frozen=True)
class Device:
    """What Inductor and Triton ask the driver for, and what a roofline needs.

    Attributes:
        capability: compute capability, `(9, 0)` for sm_90.
        memory, l2_cache: bytes.
        shared_memory: bytes that one block may have (opt-in) and that a multiprocessor has.
        bandwidth: bytes per second, of the data sheet.
        flops: per second that large matrix products are taken to reach, by precision: "fp32", "tf32", "bf16".
        launch_seconds: the least that a kernel is taken to need.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory: int
    l2_cache: int
    shared_memory: tuple[int, int]
    bandwidth: float
    flops: Mapping[str, float]
    launch_seconds: float = 2e-6

    @property
    def architecture(self) -> int:
        """90 for sm_90."""
        return self.capability[0] * 10 + self.capability[1]

    def properties(self) -> SimpleNamespace:
        """As `torch.cuda.get_device_properties` has them."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
            total_memory=self.memory,
            L2_cache_size=self.l2_cache,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared_memory[0],
            shared_memory_per_multiprocessor=self.shared_memory[1],
            gcnArchName="",
            is_integrated=0,
        )


# Data sheets: "NVIDIA H100 Tensor Core GPU" (SXM: 3.35 TB/s; dense 67 TFLOP/s fp32, 495 tf32, 989 bf16) and "NVIDIA
# A100 Tensor Core GPU" (80 GB SXM: 2.04 TB/s; 19.5, 156, 312). Assumed: products reach 0.9 of that without tensor
# cores, 0.4 to 0.65 with them. Limits of shared memory: CUDA C++ Programming Guide, "Technical Specifications per
# Compute Capability".
H100 = Device(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    132,
    80 << 30,
    50 << 20,
    (232448, 233472),
    3.35e12,
    {"fp32": 60e12, "tf32": 200e12, "bf16": 400e12},
)
A100 = Device(
    "NVIDIA A100-SXM4-80GB",
    (8, 0),
    108,
    80 << 30,
    40 << 20,
    (166912, 167936),
    2.04e12,
    {"fp32": 17.5e12, "tf32": 100e12, "bf16": 200e12},
)
DEVICES = {"H100": H100, "A100": A100}
