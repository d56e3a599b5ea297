"""What a graph reads of the graph before it (behind a graph break): it is alive only as long as it is saved."""

from __future__ import annotations

import pytest
import torch
from helpers import handed_over, reference, run, transformed
from torch import Tensor, nn

import slimfit_fx


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        x = self.layers[1](torch.relu(x))
        return self.layers[2](torch.relu(x))


@pytest.mark.parametrize("opened", [(), ("layers.1.weight",), ("layers.1.weight", "layers.2.weight")], ids=len)
def test_nothing_is_rebuilt_from_what_would_be_saved_for_it(opened):
    """Closed layers leave ReLU's masks; rebuilding their inputs would keep the activation that they are made of."""
    torch.manual_seed(0)
    model, inputs = Broken().train(), {"x": torch.randn(8, 16)}
    slim = transformed(model, always_open=())
    gates = slimfit_fx.gates(slim)
    run(slim, inputs)
    gates.set(opened)
    outputs = slim(**inputs)
    bytes_of_gates = handed_over(outputs, slim, inputs) - 2 * 8 * 16
    assert bytes_of_gates - len(opened) * 8 * 16 * 4 <= 8, "the gates themselves"
    _, expected = run(reference(model), inputs)
    _, found = run(slim, inputs)
    for name, gradient in expected.items():
        if name in gates.closed:
            assert found[name] is None
        else:
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
