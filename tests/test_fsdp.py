"""FSDP2 with layers frozen: the trajectory of one process on the whole batch, and fewer elements sent."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import io
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from sharded_net import (
    STEPS,
    close_worlds,
    compare,
    counted,
    data,
    mine,
    net,
    run_world,
    shard,
    sum_gradients,
    train,
    transformed,
    whole,
)
from small_bert import bert
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

import slimfit_fx
from examples.distributed import finetune

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform != "linux", reason="needs gloo"
)


@pytest.fixture(scope="module", autouse=True)
def worlds():
    yield
    close_worlds()


# each is compared with one process on the whole batch
VARIANTS: list[dict] = [
    {"policy": "update", "granularity": "block"},
    {"policy": "overdue", "catch_up": 1.0, "decay_moments": True},
    {"policy": "gain", "closed_state": "none", "closed_state_after": 1},
    {"policy": "gradient", "freeze_rate": 0.9},
    {"policy": "random"},
    {"policy": "cyclic", "catch_up": 0.5},
    {"policy": "static", "always_open": ("head",)},
]


def one_process(rank: int, size: int) -> None:
    for options in VARIANTS:
        model = transformed(shard(net()), **options)
        train(model, mine(rank, size))
        compare(model, **options)


def test_every_policy_is_the_run_of_one_process():
    assert {options["policy"] for options in VARIANTS} == set(slimfit_fx.POLICIES)
    run_world(one_process)


def other_settings(rank: int, size: int) -> None:
    model = transformed(shard(net(), reshard_after_forward=False))
    # gradients of the first part stay on their rank, and behind stray forwards whole parameters stay in their place
    train(model, mine(rank, size), parts=2, clip=0.1, stray=mine(rank, size)[:2])
    compare(model, clip=0.1)

    # one unit of several modules
    model = net()
    fully_shard([model.blocks[2], model.head])
    transformed(shard(model, model.blocks[:2]))
    train(model, mine(rank, size))
    compare(model)

    model = transformed(shard(net()), freeze_rate=0.0, memory_budget=24_000)
    train(model, mine(rank, size))
    compare(model, freeze_rate=0.0, memory_budget=48_000)  # of twice the batch
    assert slimfit_fx.gates(model).closed

    # a run that goes on from a checkpoint
    first, second = transformed(shard(net())), transformed(shard(net()))
    train(first, mine(rank, size)[:3])
    second.load_state_dict(first.state_dict())
    slimfit_fx.scheduler(second).load_state_dict(slimfit_fx.scheduler(first).state_dict())
    assert slimfit_fx.gates(second).open == slimfit_fx.gates(first).open
    for model in (first, second):
        train(model, mine(rank, size)[3:])
    assert all(torch.equal(value, whole(second)[name]) for name, value in whole(first).items())

    model = transformed(shard(net(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)), policy="cyclic")
    train(model, mine(rank, size))
    compare(model, tolerance=0.03, policy="cyclic")
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())


def test_other_settings_of_fsdp():
    run_world(other_settings)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Tensor) -> None:
    for tokens in batches:
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        optimizer.step()


def checkpointed(rank: int, size: int, folder: str) -> None:
    model = transformed(shard(net()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, optimizer, mine(rank, size)[:8])
    weights, states = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": states, "scheduler": slimfit_fx.scheduler(model)}
    checkpoint.save(saved, checkpoint_id=folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_is_continued_by_one(tmp_path):
    alone = transformed(net())
    steps(alone, torch.optim.AdamW(alone.parameters(), lr=0.01), data())
    run_world(checkpointed, 2, str(tmp_path))

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    weights, states = get_state_dict(model, optimizer)
    checkpoint.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    transformed(model)
    checkpoint.load({"scheduler": slimfit_fx.scheduler(model)}, checkpoint_id=tmp_path)
    steps(model, optimizer, data()[8:])
    assert slimfit_fx.gates(model).open == slimfit_fx.gates(alone).open
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-9)


def with_accelerate(rank: int, size: int) -> None:
    """`Accelerator.prepare` chooses FSDP on devices only: here it is told that it had."""
    accelerate = pytest.importorskip("accelerate")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = accelerate.DistributedType.FSDP, plugin
    try:
        model = net()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
        sum_gradients(model)
        transformed(model)
        for tokens in mine(rank, size):
            for part in tokens.chunk(2):
                with accelerator.accumulate(model):
                    accelerator.backward(model(part).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
        assert isinstance(model.blocks[0], FSDPModule)
        compare(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_shards_alike():
    pytest.importorskip("accelerate")
    run_world(with_accelerate)


def refusals(rank: int, size: int) -> None:
    with pytest.raises(slimfit_fx.ModelError, match=r"blocks\.0 in the model .* regions='blocks'"):
        transformed(shard(net()), regions="model")
    with pytest.raises(slimfit_fx.ConfigError, match="closed_state='none'"):
        transformed(shard(net()), closed_state="host")
    model = net()
    fully_shard(model.blocks[1].up)
    with pytest.raises(slimfit_fx.ModelError, match=r"Shard blocks\.1 itself"):
        transformed(model)
    with pytest.raises(slimfit_fx.ModelError, match="Shard first: fully_shard, then transform"):
        shard(transformed(net()))(data()[0])
    later = transformed(net())
    train(later, data()[:1])
    with pytest.raises(slimfit_fx.ModelError, match="Shard first: fully_shard, then transform"):
        shard(later)(data()[0])
    with pytest.raises(slimfit_fx.ModelError, match="instead of torch.compile"):
        torch.compile(shard(net()), backend="slimfit_fx")(data()[0])
    model = transformed(shard(net()))
    model.set_reduce_scatter_unused_params(True)
    with pytest.raises(slimfit_fx.StateError, match="Set it to False"):
        model(data()[0])
    for model in (FullyShardedDataParallel(net(), use_orig_params=True, device_id=torch.device("cpu")), net()):
        transformed(model)
        if not isinstance(model, FullyShardedDataParallel):
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(slimfit_fx.StateError, match="parameters of the model were replaced"):
            model(data()[0])
    model = transformed(shard(net()), policy="random", seed=rank, freeze_rate=0.5)
    slimfit_fx.gates(model).set(["head.weight"] if rank else ["blocks.0.up.weight", "head.weight"])
    with pytest.raises(slimfit_fx.StateError, match="the ranks opened different layers"):
        for _ in range(2):
            model(data()[0])


def test_what_cannot_work_is_named():
    run_world(refusals)


def example(rank: int, size: int) -> None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        finetune.train(finetune.parse(["--mode=eager", "--depth=2", "--steps=3", "--freeze-rate=0.5"]))
    lines = told.getvalue().splitlines()
    assert len(lines) == (0 if rank else 3)
    assert all("layers open" in line for line in lines)


def test_example():
    run_world(example)


def bert_elements(rank: int, size: int) -> None:
    sent = {}
    for rate in (0.0, 0.9):
        model, inputs = bert(depth=12)
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        sum_gradients(model)
        transformed(model, freeze_rate=rate, always_open=None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with counted() as counts:
            for _ in range(3):
                optimizer.zero_grad()
                model(**inputs).loss.backward()
                optimizer.step()
        sent[rate] = sum(counts)
    assert 0 < sent[0.9] <= 0.2 * sent[0.0], sent
    if rank == 0:
        print(f"elements sent: {sent}")


def test_a_frozen_layer_is_not_sent():
    pytest.importorskip("transformers")
    run_world(bert_elements)


def compiled(rank: int, size: int) -> None:
    model = transformed(shard(net(scaled=True)), mode="inductor")
    made = train(model, mine(rank, size))
    compare(model, scaled=True)
    assert made == [made[0]] * STEPS  # other layers make no other graphs
    # codecs work on rows, which no rank shares; their rounding differs where that of what they get does
    balanced = {"mode": "inductor", "preset": "balanced", "policy": "cyclic"}
    model = transformed(shard(net(scaled=True)), **balanced)
    train(model, mine(rank, size))
    compare(model, tolerance=1e-6, scaled=True, **balanced)


@pytest.mark.inductor
def test_generated_code_is_the_run_of_one_process():
    run_world(compiled)


def replicated(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = transformed(shard(net(), mesh=mesh), policy="gain")
    train(model, mine(rank, size))
    compare(model, policy="gain")


def test_shards_with_replicas():
    run_world(replicated, 4)
