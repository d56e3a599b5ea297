"""What of benchmarks/gpu_model needs neither Triton nor a process of its own: extrapolation, tables, refusals."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from benchmarks.gpu_model import guard, show
from benchmarks.gpu_model.devices import A100, H100
from benchmarks.gpu_model.trace import Op, Trace, at_depth, peak_at_depth


def layered(layers: int, saved: int, gradient: int, temporary: int, head: int) -> Trace:
    """A step of equal layers: each saves, makes a temporary tensor, and leaves a gradient."""
    trace, live = Trace(), 100

    def note(part: list[Op], extra: int = 0) -> None:
        part.append(Op("triton", "kernel", 8.0, 0.0, False, live + extra))

    note(trace.forward)
    for _ in range(layers):
        note(trace.forward, temporary)
        live += saved
        note(trace.forward)
    note(trace.forward, head)
    trace.saved = live
    note(trace.backward, head)
    for _ in range(layers):
        note(trace.backward, 2 * temporary)
        live += gradient - saved
        note(trace.backward)
    note(trace.backward)
    trace.gradients = layers * gradient
    return trace


@pytest.mark.parametrize("saved", [3, 50])
@pytest.mark.parametrize("gradient", [2, 40])
@pytest.mark.parametrize("temporary", [0, 70])
@pytest.mark.parametrize("head", [0, 500])
def test_the_peak_of_a_deep_model_follows_from_two_shallow_ones(saved, gradient, temporary, head):
    sizes = (saved, gradient, temporary, head)
    shallow, middle, deep = (layered(layers, *sizes) for layers in (2, 3, 12))
    assert peak_at_depth(shallow, middle, 1, 9) == deep.peak


def test_sums_of_a_deep_model_follow_too():
    shallow, middle, deep = (layered(layers, 10, 4, 7, 5).figures(H100, "fp32") for layers in (2, 3, 12))
    for name, figure in deep.items():
        assert at_depth(shallow[name], middle[name], 1, 9) == pytest.approx(figure), name


def test_the_roofline_is_the_longest_of_three():
    assert Op("triton", "k", 3.35e9, 0.0, False, 0).seconds(H100, "fp32") == pytest.approx(1e-3)
    assert Op("mm", "k", 1.0, 60e9, False, 0).seconds(H100, "fp32") == pytest.approx(1e-3)
    assert Op("mm", "k", 1.0, 60e9, False, 0).seconds(H100, "tf32") == pytest.approx(0.3e-3)
    assert Op("mm", "k", 1.0, 400e9, True, 0).seconds(H100, "fp32") == pytest.approx(1e-3)  # bf16 whatever fp32 is
    assert Op("triton", "k", 1.0, 0.0, False, 0).seconds(A100, "fp32") == A100.launch_seconds
    assert Op("gate", "k", 0.0, 0.0, False, 0).seconds(H100, "fp32") == 0.0


def row(method: str, total: int, **setting) -> dict:
    here = {"model": "bert", "precision": "fp32", "batch": 32, **setting}
    sizes = {"total_bytes": total, "saved_bytes": 1, "kernel_traffic": 1}
    return {**here, **sizes, "method": method, "pass_seconds": 0.08, "seconds": 0.1, "kernels": 5, "host_calls": 7}


def test_the_claim_is_met_or_not(tmp_path):
    rows = [row("eager", 660), row("torch.compile", 600), row("balanced", 200), row("tight", 300)]
    rows += [row("eager", 660, batch=8), row("balanced", 600, batch=8)]
    found = [line for line in show.claim(rows) if line.startswith("| `")]
    assert found == [
        "| `balanced`, fp32 | 2 | 2.20 | 3.30 | met and met |",
        "| `tight`, fp32 | 1 | 2.20 | 2.20 | met and not met |",
    ]
    path = tmp_path / "result.json"
    head = {"what": "simulated", "device": "H100", "torch": "2.13.0", "freeze_rate": 0.9}
    path.write_text(json.dumps({**head, "rows": rows}))
    lines = list(show.show(path))
    brief = list(show.overview(path))
    assert brief[2] == "| bert, fp32, batch 32 | 0.00 (1.00, 1.00) | 0.00 | 0.00 (1.00, 1.00) | 0.00 (1.00, 1.00) |"
    assert brief[-1] == found[-1]
    line = "| `balanced` | 0 MiB (0.33x) | 0 MiB (1.00x) | 0.0 GiB | 80.0 ms (1.00x) | 100.0 ms (1.00x) | 5 | 7 |"
    assert line in lines


def test_a_process_that_has_torch_is_refused(monkeypatch):
    monkeypatch.setattr(guard, "reason_against", lambda: "")
    with pytest.raises(guard.ToolError, match="start of a process"):
        guard.load()


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_another_version_is_refused_by_name(monkeypatch, package):
    real = {"torch": "2.13.0+cpu", "triton": "3.7.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {**real, package: "9.9.9"}[name])
    assert package in guard.reason_against()
    assert "9.9.9" in guard.reason_against()
    with pytest.raises(guard.ToolError, match=package):
        guard.load()
