"""The pipeline at work on one captured graph. Every pass runs through one function."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import fx

from slimfit_fx.graph.captured import Captured
from slimfit_fx.graph.joint import JointGraph
from slimfit_fx.graph.plan import Plan
from slimfit_fx.graph.split import SplitGraph
from slimfit_fx.presets import CodecRules

from .capture import Capture
from .pass_log import Moment, PassLog
from .pipeline import Pass, enabled, pipeline_key


class PassRun:
    """From Dynamo's graph to the split graph and its plan, which the capture gets at the end.

    Attributes:
        captured: what the passes on Dynamo's graph found.
        current: the name of the pass that runs, or that failed; `""` between passes.
        traced: whether AOTAutograd could trace the joint graph.
    """

    def __init__(
        self, capture: Capture, rules: CodecRules, disabled: Collection[str] = (), only_loss: bool = False
    ) -> None:
        self.capture = capture
        self.captured = Captured(len(capture.gated), only_loss)
        self.current = ""
        self.traced = False
        self._disabled = disabled
        self._rules = rules
        self._plan = Plan(rules=rules)
        self._graphs: Mapping[str, fx.GraphModule] = {}
        self._log = PassLog(rules.path)

    def key(self) -> str:
        """What the code depends on: the pipeline and its sources, the gated inputs, the codecs."""
        return f"{pipeline_key(self._disabled)} {self.capture.gated} {self._rules}"

    def on_captured(self, module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, Sequence[Any]]:
        """The graph from Dynamo, and its example inputs, with what AOTAutograd shall trace in it."""
        self._graphs = {"captured": module}
        for entry in enabled("captured", self._disabled):
            module, inputs = self._run(entry, module, inputs, self.captured)
        return module, inputs

    def on_joint(
        self, gm: fx.GraphModule, inputs: Sequence[object], num_fwd_outputs: int, **options: Any
    ) -> SplitGraph:
        """The pair that a joint graph of AOTAutograd's becomes. The arguments are those of any partitioner."""
        self.traced = True
        plan = self._plan = Plan(rules=self._rules, heads=self.captured.heads, whole_heads=self.captured.whole_heads)
        joint = JointGraph.copy_of(gm, num_fwd_outputs, self.capture.gated, self.capture.activations)
        self._graphs = {"joint": joint.module}
        for entry in enabled("joint", self._disabled):
            self._run(entry, joint, plan)
        (cut,) = enabled("cut", self._disabled)
        split: SplitGraph = self._run(cut, joint, inputs, **options)
        for entry in enabled("split", self._disabled):
            self._run(entry, split, plan)
        self.current = "finalize"
        split.finalize()
        self.current = ""
        self.capture.plan, self.capture.split = plan, split
        return split

    def _run(self, entry: Pass, *arguments: Any, **options: Any) -> Any:
        self.current = entry.name
        with self._log.watching(entry.name, lambda: Moment(self._graphs, self._plan)):
            result = entry.function(*arguments, **options)
            if entry.on == "captured":
                self._graphs = {"captured": result[0]}
            elif entry.on == "cut":
                self._graphs = {"forward": result.forward, "backward": result.backward}
        self.current = ""
        return result
