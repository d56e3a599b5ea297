"""Gives every random operator a seed tensor of its own, on CPU, so that equal layers are equal code, compiled once.

Inductor reads the seeds of all dropouts from one tensor, and on CPU writes a seed's place in it into the kernel: a
kernel with a dropout in it is generated and compiled again for every layer. (Triton kernels take it as an argument.)
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.nodes import call, insertion_behind
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph


def separate_seeds(split: SplitGraph, _: Plan) -> None:
    """Reads the seeds of each graph from copies of their own; there are none before Inductor made them."""
    for module in (split.forward, split.backward):
        lookups: dict[fx.Node, list[fx.Node]] = {}
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.prims.inductor_lookup_seed.default):
            lookups.setdefault(node.args[0], []).append(node)
        for seeds, reads in lookups.items():
            if seeds.meta["val"].device.type == "cpu":
                _separate(module.graph, seeds, reads)


def _separate(graph: fx.Graph, seeds: fx.Node, reads: list[fx.Node]) -> None:
    with insertion_behind(seeds):
        copies = call(graph, ops.separate.default, (seeds,), seeds)
    for read in reads:
        with graph.inserting_before(read):
            read.replace_all_uses_with(call(graph, operator.getitem, (copies, read.args[1]), read))
        graph.erase_node(read)
