"""The operators of a linear head and its cross entropy in which the logits are never whole.

    forward:   token_losses(x, weight, ...)       losses [n], log-sum-exps [n], d losses / d x [n, d]: by tokens
    backward:  head_gradients(x, weight, ..., g)  d/d weight [v, d], d/d bias [v]: by the vocabulary

Each token's gradient by its own x needs nothing of the other tokens, so the forward makes it while it has the token's
logits; the backward scales it. A weight's gradient is made of all tokens: the backward computes logits again, for one
part of the vocabulary after the other, if the head trains.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.library import register_autograd

from .gate_ops import _define, _fake, _flags, _library, _unknown_size, ops

_PARTS = 16  # one part of the logits, with what is computed of it, takes less than an eighth of them all
_LEAST = 64  # rows or columns of a part: a product of fewer is slow
_MOST = 2**26  # elements of a part

_OPTIONS = (
    "Tensor targets, Tensor? class_weights, int ignored, float smoothing, float scale, float cap, ScalarType dtype"
)


@_define(f"token_losses(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, bool inner) -> (Tensor, Tensor, Tensor)")
def token_losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, class_weights: Tensor | None, ignored: int,
    smoothing: float, scale: float, cap: float, dtype: torch.dtype, inner: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The cross entropy of each token, [n]; the log-sum-exp of its logits, [n]; and, if `inner`, the gradient of its
    loss by its x, [n, d] in x's dtype, else [0, d].

    Args:
        x: [n, d].
        weight, bias: of the linear layer, [v, d] and [v].
        targets: int64 [n]; the loss of those that are `ignored` is 0.
        class_weights: [v].
        smoothing: label smoothing.
        scale, cap: the logits are scale * product, or, with a cap, cap * tanh(scale * product).
        dtype: of the product.
    """
    rows, wide = x.shape[0], torch.promote_types(dtype, torch.float32)
    losses, sums = x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide)
    gradients = x.new_empty((rows if inner else 0, x.shape[1]))
    converted, added = weight.to(dtype), None if bias is None else bias.to(dtype)
    for part in _parts(rows, weight.shape[0]):
        logits, slopes = _logits(x[part].to(dtype), converted, added, scale, cap, wide)
        target, own, total, all_weights = _coefficients(targets[part], class_weights, ignored, smoothing, weight, wide)
        chosen = logits.gather(1, target[:, None]).squeeze(1)
        spread = _smoothed(logits, class_weights) if smoothing else None
        largest = logits.amax(1)
        exponentials = logits.sub_(largest[:, None]).exp_()
        denominator = exponentials.sum(1)
        lse = largest + denominator.log()
        loss = own * (lse - chosen)
        if spread is not None:
            loss += total * (all_weights * lse - spread)
        losses[part], sums[part] = loss.masked_fill_(targets[part] == ignored, 0), lse
        if inner:
            difference = exponentials.mul_(((own + total * all_weights) / denominator)[:, None])
            _subtract_targets(difference, target, own, total, class_weights)
            _through(difference, slopes, scale)
            gradients[part] = torch.mm(difference.to(dtype), converted).to(x.dtype)
    return losses, sums, gradients


@_fake("token_losses")
def _(x, weight, bias, targets, class_weights, ignored, smoothing, scale, cap, dtype, inner):
    wide = torch.promote_types(dtype, torch.float32)
    rows = x.shape[0]
    gradients = x.new_empty((rows if inner else 0, x.shape[1]))
    return x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=wide), gradients


@_define(
    f"head_gradients(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, Tensor sums, Tensor gradients, bool outer, "
    "bool added, Tensor? gates, int gate) -> (Tensor, Tensor)"
)
def head_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, class_weights: Tensor | None, ignored: int,
    smoothing: float, scale: float, cap: float, dtype: torch.dtype, sums: Tensor, gradients: Tensor, outer: bool,
    added: bool, gates: Tensor | None, gate: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients by weight, [v, d], and bias, [v], of `token_losses` with log-sum-exps `sums` [n], for those of its
    losses, `gradients` [n].

    Args:
        outer: whether the weight has one, else it is [0, d]; with `gates`, if `gate` is open.
        added: whether the bias has one, else it is [0].
    """
    outer = outer and (gates is None or _flags(gates)[gate])
    classes = weight.shape[0]
    of_weight = weight.new_empty((classes if outer else 0, weight.shape[1]))
    of_bias = (weight if bias is None else bias).new_empty(classes if added else 0)
    if not (outer or added):
        return of_weight, of_bias
    wide = sums.dtype
    target, own, total, all_weights = _coefficients(targets, class_weights, ignored, smoothing, weight, wide)
    own, total = own * gradients, total * gradients
    rows = x.to(dtype)
    for part in _parts(classes, x.shape[0]):
        some = None if bias is None else bias[part].to(dtype)
        weights = None if class_weights is None else class_weights[part]
        logits, slopes = _logits(rows, weight[part].to(dtype), some, scale, cap, wide)
        difference = logits.sub_(sums[:, None]).exp_().mul_((own + total * all_weights)[:, None])
        width = difference.shape[1]
        here = (target >= part.start) & (target < part.start + width)
        place = (target - part.start).clamp(0, width - 1)
        _subtract_targets(difference, place, own * here, total, weights)
        _through(difference, slopes, scale)
        if added:
            of_bias[part] = difference.sum(0)
        if outer:
            of_weight[part] = torch.mm(difference.to(dtype).t(), rows)
    return of_weight, of_bias


@_fake("head_gradients")
def _(x, weight, bias, targets, class_weights, ignored, smoothing, scale, cap, dtype, sums, gradients, outer, added,
      gates, gate):  # fmt: skip
    classes = weight.shape[0]
    rows = (classes if gates is None else _unknown_size()) if outer else 0
    return weight.new_empty((rows, weight.shape[1])), (weight if bias is None else bias).new_empty(
        classes if added else 0
    )


def _parts(count: int, other: int) -> Iterator[slice]:
    """Slices of `count` rows, or columns, of a matrix that has `other` of the other."""
    length = max(_LEAST, min(-(-count // _PARTS), _MOST // max(other, 1)))
    return (slice(start, start + length) for start in range(0, count, length))


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, cap: float, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits [n, v] in `wide`, and the derivative of the cap, [n, v], if there is one."""
    product = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    logits = product.to(wide)
    if scale != 1:
        logits *= scale
    if not cap:
        return logits, None
    logits.tanh_()
    slopes = logits.square().neg_().add_(1).mul_(cap)
    return logits.mul_(cap), slopes


def _coefficients(
    targets: Tensor, class_weights: Tensor | None, ignored: int, smoothing: float, weight: Tensor, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """Targets [n] without ignored ones; what a token's own class counts [n], what every class counts [n], and the sum
    of the weights of classes."""
    counted = targets != ignored
    target = torch.where(counted, targets, 0)
    own = counted.to(wide) * (1 - smoothing)
    total = counted.to(wide) * (smoothing / weight.shape[0])
    if class_weights is None:
        return target, own, total, float(weight.shape[0])
    return target, own * class_weights[target], total, class_weights.sum().to(wide)


def _smoothed(logits: Tensor, class_weights: Tensor | None) -> Tensor:
    return logits.sum(1) if class_weights is None else logits @ class_weights.to(logits.dtype)


def _subtract_targets(
    difference: Tensor, target: Tensor, own: Tensor, total: Tensor, class_weights: Tensor | None
) -> None:
    """Subtracts what does not come from the log-sum-exp: of the own class, and with label smoothing of every class."""
    difference.scatter_add_(1, target[:, None], -own[:, None])
    if class_weights is None:
        difference.sub_(total[:, None])
    else:
        difference.addcmul_(total[:, None], class_weights.to(difference.dtype)[None], value=-1)


def _through(difference: Tensor, slopes: Tensor | None, scale: float) -> None:
    """From gradients by logits to those by the product, in place."""
    if slopes is not None:
        difference *= slopes
    if scale != 1:
        difference *= scale


def _setup(ctx, inputs, output) -> None:
    x, weight, bias, targets, class_weights, *options, _ = inputs
    _, sums, gradients = output
    ctx.options = options
    ctx.mark_non_differentiable(sums, gradients)
    ctx.save_for_backward(x, weight, bias, targets, class_weights, sums, gradients)


def _backward(ctx, losses, _sums, _gradients):
    x, weight, bias, targets, class_weights, sums, gradients = ctx.saved_tensors
    inner, outer, added = ctx.needs_input_grad[:3]
    ignored, *_ = ctx.options
    losses = torch.where(targets == ignored, 0, losses)  # a mean of no token asks for infinite ones
    of_x = (gradients.to(losses.dtype) * losses[:, None]).to(x.dtype) if inner else None
    of_weight = of_bias = None
    if outer or added:
        of_weight, of_bias = ops.head_gradients(
            x, weight, bias, targets, class_weights, *ctx.options, sums, losses, outer, added, None, 0
        )
    return of_x, of_weight if outer else None, of_bias if added else None, *[None] * 8


register_autograd("slimfit_fx::token_losses", _backward, setup_context=_setup, lib=_library)


def head_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, class_weights: Tensor | None, ignored: int,
    smoothing: float, scale: float, cap: float, dtype: torch.dtype, result: torch.dtype, reduction: str,
) -> Tensor:  # fmt: skip
    """`cross_entropy` of the logits of `token_losses`, in the dtype `result`: a scalar, or with the reduction `"none"`
    of the shape of the targets.

    Args:
        x: [..., d].
        targets: int64 [...].
    """
    flat = targets.reshape(-1)
    losses, _, _ = ops.token_losses(
        x.reshape(-1, x.shape[-1]), weight, bias, flat, class_weights, ignored, smoothing, scale, cap, dtype,
        x.requires_grad,
    )  # fmt: skip
    if reduction == "none":
        return losses.reshape(targets.shape).to(result)
    total = losses.sum()
    if reduction == "mean":
        counted = (flat != ignored).to(losses.dtype)
        if class_weights is not None:
            counted = counted * class_weights[torch.where(flat != ignored, flat, 0)]
        total = total / counted.sum()
    return total.to(result)
