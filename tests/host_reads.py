"""Finds what would make the host wait for the device, or copy to it, where there is no device to show it."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
CONSTANTS = ("aten::lift_fresh",)  # a tensor made of Python's numbers


class Calls(TorchDispatchMode):
    """Collects the calls of these operators, of torch's own code too."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name
        if name in self.names:
            self.made.append(name)
        return function(*arguments, **(keywords or {}))
