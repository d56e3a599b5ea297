"""Trains a small transformer that is sharded over processes (FSDP2), most layers frozen at each step.

    torchrun --nproc-per-node 2 -m examples.distributed.finetune

It runs on CPUs over gloo in a minute, on random data, and prints the loss and how many layers were open at each step.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import slimfit_fx

WIDTH, WORDS, LENGTH = 64, 100, 16


class Classifier(nn.Module):
    """Tokens [batch, length], int64, to logits [batch, 2]."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        train(options)
    finally:
        dist.destroy_process_group()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--freeze-rate", type=float, default=0.8)
    parser.add_argument("--mode", choices=["inductor", "eager"], default="inductor")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(0)  # all ranks start alike
    model = Classifier(options.depth)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no average; not needed with NCCL
    slimfit_fx.transform(model, regions="blocks", mode=options.mode, freeze_rate=options.freeze_rate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    torch.manual_seed(1 + dist.get_rank())  # each rank has data of its own
    for step in range(options.steps):
        tokens = torch.randint(WORDS, (8, LENGTH))
        labels = (tokens[:, 0] < WORDS // 2).long()
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()
        opened = len(slimfit_fx.gates(model).open)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, {opened} of {len(slimfit_fx.gates(model))} layers open")


if __name__ == "__main__":
    main()
