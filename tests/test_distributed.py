"""Two processes over gloo: the trajectory of one process on the whole batch, and the same layers on both ranks."""

from __future__ import annotations

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import slimfit_fx
from slimfit_fx.integrations import open_layers_hook

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo"
)
WIDTH, STEPS, WORLD = 8, 6, 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(5)))


def transformed(model: nn.Module, **config) -> nn.Module:
    return slimfit_fx.transform(model, mode="eager", preset="exact", freeze_rate=0.6, always_open=(), **config)


def data() -> torch.Tensor:
    return torch.randn(STEPS, 4, WIDTH, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, batches: torch.Tensor, check=lambda: None, after=lambda: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer.register_step_pre_hook(lambda *_: check())
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        after()


def run_workers(target, *arguments) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    spawn(_worker, (target, port, arguments), nprocs=WORLD)


def _worker(rank: int, target, port: int, arguments) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(LOCAL_RANK=str(rank))
    import conftest  # noqa: F401  (a process of its own has not got pytest's settings)

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        target(rank, *arguments)
    finally:
        dist.destroy_process_group()


def plain(rank: int, folder: str, regions: str) -> None:
    model = transformed(net(), regions=regions)
    wrapped = DistributedDataParallel(model)
    gates, parameters = slimfit_fx.gates(model), dict(model.named_parameters())

    def frozen_have_no_gradient() -> None:
        assert all(parameters[name].grad is None for name in gates.closed)
        assert all(parameters[name].grad is not None for name in gates.open)

    def save_on_the_first_rank() -> None:
        if rank == 0:
            slimfit_fx.scheduler(model).state_dict()

    train(wrapped, data()[:, rank::WORLD], frozen_have_no_gradient, save_on_the_first_rank)
    torch.save((model.state_dict(), slimfit_fx.scheduler(model).state_dict()), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_ddp_is_the_run_of_one_process(tmp_path, regions):
    alone = transformed(net())
    train(alone, data())
    run_workers(plain, str(tmp_path), regions)
    (first, decided), (second, also) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert decided == also
    assert decided["open"] == slimfit_fx.scheduler(alone).state_dict()["open"]
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


def only_open_layers(rank: int, folder: str) -> None:
    model, gates_of_step, sent = transformed(net()), [], []
    hook = open_layers_hook(model)
    # small buckets, so that one has open layers only, another none; Dynamo wants the first to be the smallest
    torch._dynamo.config.optimize_ddp = False
    wrapped = DistributedDataParallel(model, bucket_cap_mb=6 * WIDTH**2 / 2**20)
    wrapped.register_comm_hook(None, hook)
    gates, parameters = slimfit_fx.gates(model), dict(model.named_parameters())
    original = dist.all_reduce

    def count(tensor, *args, **kwargs):
        if tensor.is_floating_point():  # gates are compared in integers
            sent[-1] += tensor.numel()
        return original(tensor, *args, **kwargs)

    def expect() -> None:
        assert all(parameters[name].grad is None for name in gates.closed)
        closed = sum(parameters[name].numel() for name in gates.closed)
        gates_of_step.append(gates.closed)
        assert sent[-1] == sum(map(torch.numel, model.parameters())) - closed
        sent.append(0)

    sent.append(0)
    dist.all_reduce = count
    try:
        train(wrapped, data()[:, rank::WORLD], expect)
        # open in the first of two micro-batches only: what that gave is sent. Both ranks have the same data
        opened = [parameters[name] for name in gates.names[:2]]
        expected = torch.autograd.grad(model.eval()(data()[0]).square().mean(), opened)
        model.train()
        model.zero_grad()
        gates.set([gates.names[0]])
        with wrapped.no_sync():
            wrapped(data()[0]).square().mean().backward()
        gates.set([gates.names[1]])
        wrapped(data()[0]).square().mean().backward()
        for parameter, gradient in zip(opened, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        closed = sum(parameters[name].numel() for name in gates.names[2:])
        assert sent[-1] == sum(map(torch.numel, model.parameters())) - closed
    finally:
        dist.all_reduce = original
    assert len(set(map(tuple, gates_of_step))) > 1
    torch.save((model.state_dict(), slimfit_fx.scheduler(model).state_dict()), f"{folder}/{rank}.pt")


def test_a_hook_sends_no_zeros(tmp_path):
    alone = transformed(net())
    train(alone, data())
    run_workers(only_open_layers, str(tmp_path))
    (first, decided), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert decided["step"] == STEPS
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)


def disagreeing(rank: int) -> None:
    model = transformed(net(), policy="random", seed=rank)
    with pytest.raises(slimfit_fx.StateError, match="the ranks opened different layers"):
        train(DistributedDataParallel(model), data()[:, rank::WORLD])


def test_ranks_that_disagree_are_named():
    run_workers(disagreeing)


def with_trainer(rank: int, folder: str) -> None:
    import transformers

    from slimfit_fx.integrations.trainer import SlimFitCallback

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x, labels=None):
            return {"loss": (self.net(x) - labels).square().mean()}

    model = transformed(Regression())
    rows = data().flatten(0, 1)
    arguments = transformers.TrainingArguments(
        output_dir=folder, per_device_train_batch_size=2, max_steps=STEPS, use_cpu=True, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, ddp_backend="gloo",
    )  # fmt: skip
    examples = [{"x": x, "labels": torch.zeros(WIDTH)} for x in rows]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[SlimFitCallback()])
    trainer.train()
    assert arguments.world_size == WORLD
    torch.save((model.state_dict(), slimfit_fx.scheduler(model).state_dict()), f"{folder}/{rank}.pt")


def test_trainer_on_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    run_workers(with_trainer, str(tmp_path))
    (first, decided), (second, also) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert decided == also
    assert decided["step"] == STEPS
    assert all(torch.equal(first[name], second[name]) for name in first)
