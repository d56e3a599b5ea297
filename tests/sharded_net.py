"""A net sharded by FSDP2 in processes over gloo, and the run of one process that it is compared with."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

import slimfit_fx

WIDTH, STEPS, TOKENS, BATCH = 22, 20, 7, 4
LIMIT = 240  # seconds until a world that hangs is ended


class Block(nn.Module):
    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place  # not in its repr: the graph that blocks share must not keep the first one's
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x)))) * self.scale()

    def scale(self) -> float:
        return 1.0 if self.place < 2 else 0.5


class Net(nn.Module):
    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block(place if scaled else 0) for place in range(3))
        self.head = nn.Linear(WIDTH, 1)  # of one row: one rank has nothing of it

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(scaled: bool = False) -> Net:
    """In float64: AdamW makes rounding errors of small gradients large. With `scaled` blocks differ in what they do."""
    torch.manual_seed(0)
    return Net(scaled).double()


def shard(model: Net, blocks: Iterable[nn.Module] | None = None, **options) -> nn.Module:
    """Shards `blocks`, all of the model's by default, and the model around them."""
    for block in model.blocks if blocks is None else blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    sum_gradients(model)
    return model


def sum_gradients(model: nn.Module) -> None:
    """gloo has no average."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)


def transformed(model: nn.Module, **options) -> nn.Module:
    given = {"mode": "eager", "preset": "exact", "freeze_rate": 0.6, "always_open": (), "regions": "blocks", **options}
    return slimfit_fx.transform(model, **given)


def data() -> torch.Tensor:
    return torch.randint(11, (STEPS, BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, batches: torch.Tensor, parts: int = 1, clip: float | None = None, stray=()) -> list[int]:
    """One step a batch, which is split into `parts`; no backward follows on the `stray` batches before.

    Returns how many graphs there were after each step.
    """
    made = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    gates, parameters = slimfit_fx.gates(model), dict(model.named_parameters())
    for batch in stray:
        model(batch)
    for batch in batches:
        optimizer.zero_grad()
        for place, tokens in enumerate(batch.chunk(parts)):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(place == parts - 1)
            (model(tokens).square().mean() / parts).backward()
        for name, parameter in parameters.items():
            if name in gates:
                assert (parameter.grad is not None) == gates[name], name
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        made.append(len(slimfit_fx.graphs(model)))
    return made


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def compare(
    model: nn.Module, tolerance: float = 1e-9, clip: float | None = None, scaled: bool = False, **options
) -> None:
    """One process makes the same choices, exactly, and gets the same weights."""
    found, decided = whole(model), slimfit_fx.scheduler(model).state_dict()
    if dist.get_rank() != 0:
        return
    alone = transformed(net(scaled), **options)
    train(alone, data(), clip=clip)
    also, expected = slimfit_fx.scheduler(alone).state_dict(), alone.state_dict()
    assert decided["open"] == also["open"]
    assert decided["missed"] == also["missed"]
    for name, value in found.items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, (name, float(error))


@contextmanager
def counted() -> Iterator[list[int]]:
    """The elements that each reduce-scatter inside sends."""
    counts: list[int] = []
    original = DefaultReduceScatter.__call__

    def count(self, output_tensor, input_tensor, *args, **kwargs):
        counts.append(input_tensor.numel())
        return original(self, output_tensor, input_tensor, *args, **kwargs)

    DefaultReduceScatter.__call__ = count
    try:
        yield counts
    finally:
        DefaultReduceScatter.__call__ = original


class World:
    """Processes over gloo that run one function after another: each costs seconds to start."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            self._ends.append(here)
            self._processes.append(context.Process(target=_serve, args=(there, rank, port, size), daemon=True))
            self._processes[-1].start()
            there.close()

    def run(self, target: Callable[..., None], *arguments) -> None:
        """Calls `target(rank, size, *arguments)` in every process. One that fails or hangs ends them all."""
        for end in self._ends:
            end.send((target, arguments))
        waiting, limit = list(self._ends), time.monotonic() + LIMIT
        try:
            while waiting:
                ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, limit - time.monotonic()))
                assert ready, f"{target.__name__} did not end"
                for end in ready:
                    problem = end.recv()  # EOFError: the process died
                    assert problem is None, problem
                    waiting.remove(end)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        _worlds.pop(len(self._processes), None)


_worlds: dict[int, World] = {}


def run_world(target: Callable[..., None], size: int = 2, *arguments) -> None:
    if size not in _worlds:
        _worlds[size] = World(size)
    _worlds[size].run(target, *arguments)


def close_worlds() -> None:
    for world in list(_worlds.values()):
        world.close()


def _serve(end, rank: int, port: int, size: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    import conftest  # noqa: F401  (a process of its own has not got pytest's settings)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
    while True:
        try:
            target, arguments = end.recv()
        except EOFError:
            return
        try:
            target(rank, size, *arguments)
        except BaseException:
            end.send(f"rank {rank}:\n{traceback.format_exc()}")
        else:
            end.send(None)
        torch.compiler.reset()


def mine(rank: int, size: int) -> torch.Tensor:
    """This rank's share of each batch."""
    return data()[:, rank::size]
