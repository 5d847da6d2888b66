"""MLPs that are down(silu(gate(x)) · up(x)), as Llama's: a plan may make what down reads.

Gate and up are the widest outputs of a model. An adapter's part is added to them where they are
read for the activation, so they are not read and written once more for it.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn
from transformers.activations import SiLUActivation

if TYPE_CHECKING:
    from malora_server.model.linears import LinearGroup

GATED = ("gate_proj", "up_proj")
_EXPRESSION = "down_proj(act_fn(gate_proj(x)) * up_proj(x))"


class GatedMlp(nn.Module):
    """Stands where such an MLP stood, and is that MLP unless the batch's plan activates."""

    def __init__(self, mlp: nn.Module, group: LinearGroup) -> None:
        """group: the MLP's gate and up."""
        super().__init__()
        self.mlp = mlp
        self._group = [group]

    def forward(self, x: Tensor) -> Tensor:
        group = self._group[0]
        if group.context.activates:
            return self.mlp.down_proj(group.activated(x))  # type: ignore[operator]
        return self.mlp(x)


def is_gated(module: nn.Module) -> bool:
    """Whether a module's own code is that, and nothing else."""
    children = dict(module.named_children())
    if children.keys() != {*GATED, "down_proj", "act_fn"}:
        return False
    if not isinstance(children["act_fn"], nn.SiLU | SiLUActivation):
        return False
    try:
        x, *_, output = _Tracer().trace(module).nodes
    except Exception:  # whatever code does that asks for values of x
        return False
    return _written(output.args[0], x) == _EXPRESSION


class _Tracer(fx.Tracer):
    """Traces one module's code, into none of its children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def _written(node: object, x: fx.Node) -> str:
    """What a traced value is, as Python would write it; "?" for what does not matter here."""
    if node is x:
        return "x"
    if not isinstance(node, fx.Node) or node.kwargs:
        return "?"
    arguments = [_written(argument, x) for argument in node.args]
    if node.op == "call_module":
        return f"{node.target}({', '.join(arguments)})"
    return " * ".join(arguments) if node.target is operator.mul else "?"
