"""Gradients are watched on nodes of autograd, which belong to the stream in which they were made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import transformed
from torch import nn
from torch.autograd.graph import get_gradient_edge

import slimfit_fx
from slimfit_fx import SlimFitWarning
from slimfit_fx.runtime.outside import OutsideGradients


@pytest.mark.parametrize("regions", ["model", "blocks"])
def test_nodes_are_made_anew_in_another_stream(regions, monkeypatch):
    """And what is watched stays watched."""
    streams = ["default"]
    monkeypatch.setattr(OutsideGradients, "_current_stream", lambda _: streams[-1])
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    slim = transformed(model, freeze_rate=0.0, always_open=(), regions=regions)
    slimfit_fx.gates(slim).set([])

    def unmarked() -> int:
        """How many of the nodes were not looked at yet; looks at them."""
        found: list[Any] = [get_gradient_edge(p).node.metadata for p in slim.parameters() if p.dim() > 1]
        return len([metadata.setdefault("seen", True) for metadata in found if "seen" not in metadata])

    for stream, fresh in (("default", 2), ("default", 0), ("side", 2), ("side", 0), ("default", 2)):
        streams.append(stream)
        slim(torch.ones(3, 8)).sum().backward()
        assert unmarked() == fresh, stream
    with pytest.warns(SlimFitWarning, match="none of its graphs computed"):
        slim[0].weight.square().sum().backward()
    assert slim[0].weight.grad is None


def test_without_a_gpu_there_is_no_stream():
    slim = transformed(nn.Sequential(nn.Linear(8, 8)), freeze_rate=0.0)
    outside = OutsideGradients(slim, slimfit_fx.gates(slim), {slim[0].weight: 0}, str)
    assert outside._current_stream() is None
    outside.close()
