"""A communication hook for DistributedDataParallel that does not send the zeros of frozen layers.

    wrapped = DistributedDataParallel(slimfit_fx.transform(model))
    wrapped.register_comm_hook(None, open_layers_hook(model))

Without it whole buckets are reduced, with zeros for layers that are closed on all ranks.
"""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

import slimfit_fx


def open_layers_hook(
    model: nn.Module, process_group: dist.ProcessGroup | None = None
) -> Callable[[Any, dist.GradBucket], Future[Tensor]]:
    """A hook for `DistributedDataParallel.register_comm_hook` that averages the gradients of open layers, and those of
    parameters without a gate. No collective runs for a bucket in which all are closed.

    It copies what it sends once, unless a bucket is open as a whole.

    Args:
        model: the transformed one, as it was before it was wrapped.
        process_group: as DistributedDataParallel has it; None for all ranks.

    Raises:
        StateError: the model is not transformed.
    """
    scheduler = slimfit_fx.scheduler(model)

    def reduce(_: Any, bucket: Any) -> Any:
        is_sent = scheduler.is_open
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        gradients = [gradient for parameter, gradient in pairs if is_sent(parameter)]
        whole: Tensor = bucket.buffer()
        if not gradients:
            done: Future[Tensor] = Future()
            done.set_result(whole)
            return done
        complete = len(gradients) == len(bucket.gradients())
        sent = whole if complete else torch.cat([gradient.reshape(-1) for gradient in gradients])
        sent.div_(dist.get_world_size(process_group))
        work = dist.all_reduce(sent, group=process_group, async_op=True)
        assert work is not None

        def put_back(_: Future[Any]) -> Tensor:
            if not complete:
                parts = sent.split([gradient.numel() for gradient in gradients])
                for gradient, part in zip(gradients, parts, strict=True):
                    gradient.copy_(part.view(gradient.shape))
            return whole

        return work.get_future().then(put_back)

    reduce.__annotations__.clear()  # DistributedDataParallel compares them with classes, and these are strings
    return reduce
