"""The plan of a graph pair: every saved tensor and every gated gradient. One source of truth.

Passes fill it in, `report` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from slimfit_fx.codecs import Choice, Codec, Format
from slimfit_fx.module_paths import joined
from slimfit_fx.presets import CodecRules


@dataclass
class SavedTensor:
    """What the forward graph hands to the backward graph.

    Attributes:
        name: of the backward's placeholder; that of the derivative, if it is stored in its place.
        module: path of the module that made it, `""` for the model itself.
        role: what it is to the backward, for example `"linear input"` or `"dropout mask"`.
        shape: as the forward saw it at capture; a dimension of dynamic size is its symbol.
        dtype: as torch names it, for example `"float32"`.
        gates: those that decide whether it is kept; empty for a static tensor.
        nbytes: of its part of the storage that stays alive for it; 0 if that is an input, a parameter or another row's.
        borrowed: whether the caller holds its storage anyway: an input, a parameter, or a view of one.
        rows: how many rows a dynamic tensor has when a gate is open.
        rebuildable: whether it is left out if it can be computed from other saved tensors.
        choice: what the configuration wants for it; None stores it as it is.
        undecided: the choice that is left to a pass that is still to come.
        codec: what stores it, if it is not rebuilt; None, as it is. What a choice comes to is known behind its pass.
        stored: bytes of what is handed over in its place.
        form: how it is stored, in words: the codec that was used; `"rebuilt"`, point by point, or `"recomputed"`, with
            matrix products, from others; `""` for as it is.
        derived: whether the activation function's derivative is stored in its place.
    """

    name: str
    module: str
    role: str
    shape: tuple[int | str, ...]
    dtype: str
    gates: tuple[int, ...]
    nbytes: int
    borrowed: bool = False
    rows: int = 0
    rebuildable: bool = True
    choice: Format | None = None
    undecided: Choice | None = None
    codec: Codec | None = None
    stored: int = -1
    form: str = ""
    derived: bool = False

    def __post_init__(self) -> None:
        if self.stored < 0:
            self.stored = self.nbytes

    @property
    def dynamic(self) -> bool:
        """Whether only weight gradients of gated layers need it, so that it can be dropped."""
        return bool(self.gates)

    def bytes_at(self, open_gates: Sequence[bool]) -> int:
        """Bytes kept alive by a forward that sees these gates."""
        if self.dynamic and not any(open_gates[gate] for gate in self.gates):
            return 0
        return self.stored

    def want(self, choice: Format | None) -> None:
        """Notes what the configuration wants."""
        self.choice = choice
        self.decide(choice)

    def decide(self, format: Format | None) -> None:
        """Notes what a choice came to: a codec, None, or a choice for a later pass."""
        self.undecided = format if isinstance(format, Choice) else None
        self.codec = format if isinstance(format, Codec) else None

    def store(self, nbytes: int, form: str = "") -> None:
        """Notes what a pass made of it."""
        self.stored = nbytes
        self.form = ", ".join(filter(None, ("derivative" if self.derived else "", form)))


@dataclass(frozen=True)
class GatedGradient:
    """What became of the gradient of a gated parameter.

    Attributes:
        output: its place among the outputs of the backward graph.
        gate: the one that it obeys.
        conditional: True if a closed gate skips the computation; False if the gradient is computed, then dropped.
    """

    output: int
    gate: int
    conditional: bool


@dataclass
class Plan:
    """All saved tensors of one captured graph, in the order in which they are handed over, and its gated gradients.

    Attributes:
        saved: in the order in which they are handed over.
        gradients: of the gated parameters, in the order of the inputs.
        rules: which codec the configuration wants for a tensor, by role and module.
        heads: paths of the modules whose linear head and loss are computed in parts.
        whole_heads: the same of those that are not, because their logits are returned.

    Gates are numbered as in the graph, one for each gated input; `in_model` numbers them as in the model's gate table.
    """

    saved: list[SavedTensor] = field(default_factory=list)
    gradients: list[GatedGradient] = field(default_factory=list)
    rules: CodecRules = field(default_factory=lambda: CodecRules("exact", {}))
    heads: list[str] = field(default_factory=list)
    whole_heads: list[str] = field(default_factory=list)

    def find(self, name: str) -> SavedTensor | None:
        """The tensor that both graphs call `name`; None for an input that a pass added to what is saved."""
        return next((tensor for tensor in self.saved if tensor.name == name), None)

    def in_model(self, layers: Sequence[int | None], path: str) -> Plan:
        """The plan of one run of the graph, in terms of the model.

        Args:
            layers: the layer behind each gate of the graph; None where there is none: always open.
            path: of the module that the graph was captured in.
        """

        def place(tensor: SavedTensor) -> SavedTensor:
            found = [layers[gate] for gate in tensor.gates]
            gates = () if None in found else tuple(sorted({layer for layer in found if layer is not None}))
            return replace(tensor, gates=gates, module=joined(path, tensor.module))

        gated = ((gradient, layers[gradient.gate]) for gradient in self.gradients)
        return Plan(
            [place(tensor) for tensor in self.saved],
            [replace(gradient, gate=layer) for gradient, layer in gated if layer is not None],
            heads=[joined(path, head) for head in self.heads],
            whole_heads=[joined(path, head) for head in self.whole_heads],
        )

    @property
    def nbytes(self) -> int:
        """Bytes that would be handed over with every gate open and nothing rebuilt or encoded."""
        return sum(tensor.nbytes for tensor in self.saved)

    def bytes_at(self, open_gates: Sequence[bool]) -> int:
        """Bytes that the forward hands to the backward when it sees these gates."""
        return sum(tensor.bytes_at(open_gates) for tensor in self.saved)


def merge_plans(plans: Iterable[Plan]) -> Plan:
    """One plan for a forward that runs several graphs: after a graph break, or one a region."""
    plans = list(plans)
    return Plan(
        [tensor for plan in plans for tensor in plan.saved],
        [gradient for plan in plans for gradient in plan.gradients],
        heads=[head for plan in plans for head in plan.heads],
        whole_heads=[head for plan in plans for head in plan.whole_heads],
    )
