"""Makes weight gradients and the activations that only they need conditional on their layer's gate.

Runs on the joint graph, before the partitioner. The partitioner then sees which tensors the backward needs whatever
the gates say, and saves just those: a normalised activation, say, and not its affine image beside it.

A linear layer's weight gradient is one matrix product, in whatever form the layer was called: 2-D or 3-D, with and
without bias, under autocast, with dynamic shapes. It becomes

    forward:   kept = save_if_open(x, gates, needed_by)             x [n, k], or [0, k] when all its layers are closed
    backward:  weight_gradient(gradient, kept, gates, gate)         [m, k], or [0, k] when the layer is closed

where one `kept` serves all layers that x feeds. If the backward reads x for another reason (attention's backward reads
its own output), then x is static, and the product reads it directly. An embedding's gradient, rows summed by index, is
skipped in the same way, and so is that of a head whose loss is computed in parts, tied to the embedding or not. The
gradients of everything else (convolutions, norms, other tied weights) are computed, and dropped when their gate is
closed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from slimfit_fx.analysis.head_gradient import HeadGradient, match_head
from slimfit_fx.graph.gate_ops import ops
from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.graph.nodes import CONVERSIONS, aten, base_of, dependent_on_gradients, hint, next_of, readers
from slimfit_fx.graph.plan import GatedGradient, Plan
from slimfit_fx.torch_internals import must_recompute

_TRANSPOSES = frozenset({aten.permute.default, aten.t.default, aten.transpose.int})


@dataclass(frozen=True)
class _LinearGradient:
    """A weight gradient of the form `transpose?(convert?(product))`, product = mm(first, second).

    Inductor pads products whose sizes do not suit a GPU, before our passes run: then `product` is that of the padded
    factors, of which the result is a part, and `first` and `second` are what they were.
    """

    position: int
    gate: int
    product: fx.Node
    first: fx.Node
    second: fx.Node
    activation: fx.Node
    transposed: bool
    dtype: torch.dtype


class _Reading(NamedTuple):
    """A product that reads `rows`, [n, ...], only if its gate is open."""

    product: fx.Node
    rows: fx.Node
    gate: int


def gate_dynamic(joint: JointGraph, plan: Plan) -> None:
    """Makes weight gradients and the activations that only they need conditional, and notes in the plan what became of
    each gated gradient, in the order of the inputs."""
    gradients = joint.gradients()
    gate_of = {position: gate for gate, position in enumerate(joint.gated) if position in gradients}
    gates = joint.gates
    backward = dependent_on_gradients(joint.graph)
    linear, heads = {}, {}
    for position, gate in gate_of.items():
        if (match := _match(position, gate, gradients[position], backward)) is not None:
            linear[position] = match
        elif (head := match_head(gradients[position], gate)) is not None:
            heads[position] = head
    readings = [_Reading(match.product, _rows(match), match.gate) for match in linear.values()]
    readings += [_Reading(head.product, head.activation, head.gate) for head in heads.values() if not head.has_bias]
    kept = _keep_activations(joint, gates, readings, backward)

    for position, gate in gate_of.items():
        gradient, conditional = gradients[position], True
        if position in linear:
            new = _insert_weight_gradient(joint, gates, linear[position], kept)
        elif (total := _embedding_sum(gradient)) is not None:
            new = _insert_embedding_gradient(joint, gates, gate, total, gradient.meta["val"].dtype)
        elif position in heads:
            new = _insert_head_gradient(joint, gates, heads[position], kept)
        else:
            new, conditional = _insert_pass_gradient(joint, gates, gate, gradient), False
        plan.gradients.append(GatedGradient(joint.set_gradient(position, new), gate, conditional))
    joint.graph.eliminate_dead_code()
    joint.graph.lint()
    joint.module.recompile()


def _match(position: int, gate: int, gradient: fx.Node, backward: set[fx.Node]) -> _LinearGradient | None:
    """Reads `gradient` as a linear layer's weight gradient, if it is one and nothing else uses it."""
    node, transposed, cut = gradient, False, False
    while node.target in _TRANSPOSES or node.target in CONVERSIONS or _is_first_part(node):
        if len(node.users) > 1:
            return None
        transposed ^= _transposes(node)
        cut |= _is_first_part(node)
        node = node.all_input_nodes[0]
    if node.target is not aten.mm.default or len(node.users) > 1:
        return None
    first, second = _unpadded(*node.args, _sizes(gradient)[:: -1 if transposed else 1])  # type: ignore[arg-type]
    if cut and (first, second) == node.args:
        return None  # a part of the product
    if (first in backward) == (second in backward):
        return None
    activation = second if first in backward else first
    return _LinearGradient(
        position,
        gate,
        product=node,
        first=first,
        second=second,
        activation=activation,
        transposed=transposed,
        dtype=gradient.meta["val"].dtype,
    )


def _keep_activations(
    joint: JointGraph,
    gates: fx.Node,
    readings: list[_Reading],
    backward: set[fx.Node],
) -> dict[fx.Node, fx.Node]:
    """Inserts one `save_if_open` for every activation that only matched products read in the backward."""
    products = {reading.product for reading in readings}
    gates_of: dict[fx.Node, set[int]] = {}
    for reading in readings:
        gates_of.setdefault(reading.rows, set()).add(reading.gate)

    kept = {}
    results = set(joint.outputs)
    held = {node for position, node in joint.inputs.items() if position not in joint.activations}
    for activation, needed_by in gates_of.items():
        base = base_of(activation)
        other = any(reader in backward and reader not in products for reader in readers(activation))
        given = base in held or base in results or activation in results
        if other or given or must_recompute(base):
            continue
        kept[activation] = joint.insert(
            ops.save_if_open.default,
            (activation, gates, sorted(needed_by)),
            before=next_of(activation),
            origin=activation,
        )
    for node in kept.values():
        joint.add_output(node)
    return kept


def _insert_weight_gradient(
    joint: JointGraph, gates: fx.Node, match: _LinearGradient, kept: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    product = match.product
    rows = _rows(match)
    operand = kept.get(rows, rows)
    if rows is not match.activation:
        operand = joint.insert(aten.permute.default, (operand, [1, 0]), before=product, origin=product)
    operands = (operand, match.second) if match.activation is match.first else (match.first, operand)
    arguments = (*operands, gates, match.gate, match.dtype)
    new = joint.insert(ops.weight_gradient.default, arguments, before=product, origin=product)
    if match.transposed:
        new = joint.insert(aten.permute.default, (new, [1, 0]), before=product, origin=product)
    return new


def _embedding_sum(gradient: fx.Node) -> fx.Node | None:
    """The sum of rows by index into zeros that `gradient` is, up to its dtype; None if it is none."""
    node = gradient
    while node.target in CONVERSIONS and len(node.users) == 1:
        node = node.all_input_nodes[0]
    if node.target is not aten._unsafe_masked_index_put_accumulate.default or len(node.users) > 1:
        return None
    zeros, _, indices, _ = node.args
    into_zeros = zeros.target is aten.full.default and zeros.args[1] == 0  # type: ignore[union-attr]
    return node if into_zeros and len(indices) == 1 else None  # type: ignore[arg-type]


def _insert_embedding_gradient(
    joint: JointGraph, gates: fx.Node, gate: int, total: fx.Node, dtype: torch.dtype
) -> fx.Node:
    zeros, mask, (indices,), rows = total.args  # type: ignore[misc]
    count = zeros.args[0][0]  # type: ignore[union-attr, index]
    arguments = (rows, indices, mask, count, gates, gate, dtype)
    return joint.insert(ops.embedding_gradient.default, arguments, before=total, origin=total)


def _insert_head_gradient(
    joint: JointGraph, gates: fx.Node, match: HeadGradient, kept: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Gives the operator the gate; its other result, of the bias, is computed whatever that says."""
    old = match.product
    rows = match.activation
    arguments = (kept.get(rows, rows), *old.args[1:-2], gates, match.gate)
    new = joint.insert(ops.head_gradients.default, arguments, before=old, origin=old)
    result = joint.insert(operator.getitem, (new, 0), before=next_of(old), origin=match.part)
    for part in set(old.users) - {match.part}:
        part.replace_all_uses_with(
            joint.insert(operator.getitem, (new, part.args[1]), before=next_of(old), origin=part)
        )
    if match.rest is None:
        return result
    (total,) = match.part.users
    rest, dtype = match.rest, match.rest.meta["val"].dtype
    if (rows_by_index := _embedding_sum(rest)) is not None:
        rest = _insert_embedding_gradient(joint, gates, match.gate, rows_by_index, dtype)
    return joint.insert(ops.sum_if_open.default, (result, rest, gates, match.gate), before=total, origin=total)


def _insert_pass_gradient(joint: JointGraph, gates: fx.Node, gate: int, gradient: fx.Node) -> fx.Node:
    arguments = (gradient, gates, gate)
    return joint.insert(ops.pass_gradient.default, arguments, before=next_of(gradient), origin=gradient)


def _rows(match: _LinearGradient) -> fx.Node:
    """The activation as [n, k], a row per token: as a product's first factor it comes transposed."""
    activation = match.activation
    if activation is match.first and _transposes(activation):
        return activation.all_input_nodes[0]
    return activation


def _unpadded(first: fx.Node, second: fx.Node, sizes: list[int]) -> tuple[fx.Node, fx.Node]:
    """The factors that were padded with zeros to make a product of which a part has `sizes`, or the factors as they
    are: a user may pad, too."""
    a, b = _source_of_padding(first), _source_of_padding(second)
    (rows, inner), (same_inner, columns) = _sizes(a), _sizes(b)
    return (a, b) if inner == same_inner and [rows, columns] == sizes else (first, second)


def _is_first_part(node: fx.Node) -> bool:
    """Whether a node takes something away at the end of a dimension."""
    if node.target is not aten.slice.Tensor:
        return False
    _, start, _, step = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
    return not start and step == 1


def _source_of_padding(node: fx.Node) -> fx.Node:
    if node.target is not aten.constant_pad_nd.default:
        return node
    source, amounts, *value = node.args
    behind = all(amount >= 0 for amount in amounts) and not any(amounts[::2])  # type: ignore[union-attr, operator, index]
    return source if behind and not any(value) else node  # type: ignore[return-value]


def _sizes(node: fx.Node) -> list[int]:
    return [hint(size) for size in node.meta["val"].shape]


def _transposes(node: fx.Node) -> bool:
    """Whether a node exchanges the two dimensions of a matrix: a permutation may leave them where they are."""
    if node.target is aten.permute.default:
        return [dim % 2 for dim in node.args[1]] == [1, 0]  # type: ignore[operator, union-attr]
    if node.target is aten.transpose.int:
        _, first, second = node.args
        return (first - second) % 2 == 1  # type: ignore[operator]
    return node.target is aten.t.default
