"""Writes the plan: labels every saved tensor of a split graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slimfit_fx.analysis.find_role import find_role
from slimfit_fx.graph.nodes import bytes_of, hint, is_tensor, keep_of, module_of, storage_bytes, storage_of
from slimfit_fx.graph.plan import Plan, SavedTensor
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.roles import GATES


def make_plan(split: SplitGraph, plan: Plan) -> None:
    """Labels every saved tensor: role, module, gates, bytes.

    A storage's bytes are counted once, and not at all where the caller holds it anyway.
    """
    gates = split.gates
    inputs = {
        storage_of(node)
        for position, node in split.inputs().items()
        if is_tensor(node) and position not in split.activations and node is not gates
    }
    sizes = _bytes_of_storages(split)
    for produced, taken in split.saved():
        storage = storage_of(produced)
        kept = keep_of(produced)
        value = (kept.args[0] if kept else produced).meta["val"]  # type: ignore[union-attr]
        rows = hint(value.shape[0]) if kept else 0
        role = GATES if produced is gates else find_role(produced, taken)
        plan.saved.append(
            SavedTensor(
                name=taken.name,
                module=module_of(produced),
                role=role,
                shape=tuple(int(size) if str(size).isdigit() else str(size) for size in value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                gates=tuple(kept.args[2]) if kept else (),  # type: ignore[arg-type]
                nbytes=0 if storage in inputs else next(sizes[storage]),
                borrowed=storage in inputs,
                rows=rows,
                rebuildable=plan.rules.rebuild and role != GATES,
            )
        )


def _bytes_of_storages(split: SplitGraph) -> dict[Any, Iterator[int]]:
    """For each storage the bytes that each saved tensor in it stands for: its own, and the first one for the rest.

    Views that overlap are counted once, with the first of them.
    """
    shares: dict[Any, list[int]] = {}
    totals: dict[Any, int] = {}
    for produced, _ in split.saved():
        kept = keep_of(produced)
        rows = hint(kept.args[0].meta["val"].shape[0]) if kept else 0  # type: ignore[union-attr]
        storage = storage_of(produced)
        shares.setdefault(storage, []).append(bytes_of(produced, rows))
        totals[storage] = storage_bytes(produced, rows)
    for storage, (first, *others) in shares.items():
        if first + sum(others) > totals[storage]:
            others = [0] * len(others)
        shares[storage] = [totals[storage] - sum(others), *others]
    return {storage: iter(sizes) for storage, sizes in shares.items()}
