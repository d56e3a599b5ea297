"""The gate table: one boolean per layer, open (trained this step) or closed (frozen this step)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence

import torch

from slimfit_fx.errors import StateError


class Gates(MutableMapping[str, bool]):
    """A mapping from layer name to gate, over one bool per layer. Compiled graphs take what `read` returns as an input.

    Every gate starts open. Setting a gate never recompiles; a forward that already ran keeps the gates that it saw.
    A gate that is set by hand holds from the next training forward up to the next optimizer step behind that; then the
    scheduler chooses again. It chooses all gates that were not set by hand.

    Example:
        >>> gates = Gates(["encoder.weight", "head.weight"])
        >>> gates["encoder.weight"] = False
        >>> gates.open
        ['head.weight']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names: tuple[str, ...] = tuple(names)
        # on the CPU whatever torch.set_default_device says: reading it must not wait for a device
        self.table: torch.Tensor = torch.ones(len(self.names), dtype=torch.bool, device="cpu")
        self._by_hand: dict[int, bool] = {}  # since the last forward
        self._index = {name: index for index, name in enumerate(self.names)}

    def __getitem__(self, name: str) -> bool:
        return bool(self.table[self._position(name)])

    def __setitem__(self, name: str, is_open: bool) -> None:
        position = self._position(name)
        self._by_hand[position] = bool(is_open)
        self.table[position] = bool(is_open)

    def __delitem__(self, name: str) -> None:
        raise StateError("a gate cannot be deleted; never_gate leaves a parameter without one")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Gates({len(self.open)} open of {len(self)})"

    @property
    def open(self) -> list[str]:
        """The names of the layers that train, in the model's order."""
        return [name for name, is_open in zip(self.names, self.table.tolist(), strict=True) if is_open]

    @property
    def closed(self) -> list[str]:
        """The names of the frozen layers, in the model's order."""
        return [name for name, is_open in zip(self.names, self.table.tolist(), strict=True) if not is_open]

    def set(self, open_names: Iterable[str]) -> None:
        """Opens the gates of `open_names` and closes all others."""
        opened = {self._position(name) for name in open_names}
        self._by_hand = {position: position in opened for position in range(len(self))}
        self.set_flags([position in opened for position in range(len(self))])

    def read(self, layers: Sequence[int | None]) -> torch.Tensor:
        """The gates of `layers` as they are now, by position, in a CPU bool tensor of its own; None reads as open."""
        flags = self.table.tolist()
        return torch.tensor([layer is None or flags[layer] for layer in layers], dtype=torch.bool, device="cpu")

    def set_flags(self, flags: Sequence[bool]) -> None:
        """Sets all gates, in the order of `names`; not by hand."""
        self.table.copy_(torch.tensor(list(flags), dtype=torch.bool, device="cpu"))

    def choose(self, flags: Sequence[bool]) -> None:
        """Sets all gates but those that were set by hand since the last forward."""
        self.set_flags([self._by_hand.get(position, is_open) for position, is_open in enumerate(flags)])

    def forget_by_hand(self) -> None:
        """What was set by hand is in use from now on, or void: the next choice replaces it."""
        self._by_hand.clear()

    def _position(self, name: str) -> int:
        try:
            return self._index[name]
        except KeyError:
            examples = ", ".join(self.names[:3])
            raise KeyError(f"no layer {name!r} among {len(self)}; names look like {examples}") from None
