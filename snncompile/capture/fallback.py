"""What becomes of an operation that fails on tensors without data although the network itself runs.

Its module is called as it is, step by step. So it goes with code that looks into values, and with values that a trace
takes for tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..functional import reset_net
from ..ir import Node, OpKind
from ..torch_private import no_modes
from .adapter import Leaf
from .capture import Captured
from .copies import copy_network
from .hidden_states import RandomState
from .leaves import without_hooks
from .shapes import NodeFailure


class Fallback:
    """The modules of one network to keep as they are, the smallest that will do.

    Args:
        net: The network.
        inputs: One step `[N, *]` for each input; without data.

    Attributes:
        forced: Qualified name -> how to treat the module.
    """

    def __init__(self, net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.forced: dict[str, Leaf] = {}
        self._net = net
        self._inputs = inputs
        self._first: CaptureError | None = None

    def widen(self, failure: NodeFailure, captured: Captured) -> None:
        """Keep one module more as it is: the one that failed or, if that is kept already, the next one around it.

        Raises:
            CaptureError: The first failure, where the network itself does not run on such inputs either.
        """
        if self._first is None:
            self._first = failure
            if not self._runs():
                raise failure
        called = {*captured.traced, *captured.leaves}
        name = next((name for name in _around(failure.node) if name in called and name not in self.forced), None)
        if name is None:
            raise self._first
        self.forced[name] = Leaf(OpKind.OPAQUE, f"it cannot be followed without data: {failure.reason}")

    def _runs(self) -> bool:
        """Whether a copy of the network takes one step of zeros from reset states."""
        twin = without_hooks(copy_network(self._net, {}))
        with RandomState(), torch.no_grad(), no_modes():
            try:
                reset_net(twin)
                twin(*(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in self._inputs))
            except Exception:  # whatever a network raises; the first failure says it with the module's name
                return False
        return True


def _around(node: Node) -> list[str]:
    """The module that a node calls, or in whose forward it stands, and all that contain it."""
    calls = node.kind in (OpKind.MODULE, OpKind.STATEFUL, OpKind.OPAQUE)
    name = str(node.target) if calls else node.scope
    parts = name.split(".") if name else []
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
