"""The gate table: one boolean per layer, open (trained this step) or closed (frozen this step)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence

import torch

from .errors import StateError


class Gates(MutableMapping[str, bool]):
    """A mapping from layer name to gate, over one bool per layer. Compiled graphs take what `read` returns as an input.

    Every gate starts open. Setting a gate never recompiles; a forward that already ran keeps the gates that it saw.

    Example:
        >>> gates = Gates(["encoder.weight", "head.weight"])
        >>> gates["encoder.weight"] = False
        >>> gates.open
        ['head.weight']
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.table = torch.ones(len(self.names), dtype=torch.bool)
        self._index = {name: index for index, name in enumerate(self.names)}

    def __getitem__(self, name: str) -> bool:
        return bool(self.table[self._position(name)])

    def __setitem__(self, name: str, is_open: bool) -> None:
        self.table[self._position(name)] = bool(is_open)

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
        positions = [self._position(name) for name in open_names]
        flags = [False] * len(self)
        for position in positions:
            flags[position] = True
        self.set_flags(flags)

    def read(self, layers: Sequence[int | None]) -> torch.Tensor:
        """The gates of `layers` as they are now, by position, in a CPU bool tensor of its own; None reads as open."""
        flags = self.table.tolist()
        return torch.tensor([layer is None or flags[layer] for layer in layers], dtype=torch.bool)

    def set_flags(self, flags: Sequence[bool]) -> None:
        """Sets all gates, in the order of `names`."""
        self.table.copy_(torch.tensor(list(flags), dtype=torch.bool))

    def _position(self, name: str) -> int:
        try:
            return self._index[name]
        except KeyError:
            examples = ", ".join(self.names[:3])
            raise KeyError(f"no layer {name!r} among {len(self)}; names look like {examples}") from None
