"""The base model's linears with the batch's adapters added to their outputs.

Linears that read the same input (q/k/v, gate/up) become one group: one base product, and one
plan of their adapters' rows. The model's own code is untouched: each of its linears is replaced by
a view of the group's output.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from malora.kernels.batched import ActivatingPlan, BatchPlan, Linear
from malora.kernels.resident import Group, Site
from malora_server.model.gated_mlp import GATED, GatedMlp, is_gated
from malora_server.model.quantization import (
    Float8Weight,
    can_stack,
    check_weight,
    quantise_rows,
    stack,
)

FUSED = (("q_proj", "k_proj", "v_proj"), GATED)
"""Siblings that read the same input in the models of transformers."""


class AdapterContext:
    """What the linears read."""

    def __init__(self) -> None:
        self.plan: BatchPlan | None = None
        self.separate = False
        """Whether what adapters add comes beside the base product. On its own, not asked of the
        plan: a compiled layer is one for each value of it."""
        self.activates = False
        """Whether the plan makes gated activations; likewise."""

    def start(self, plan: BatchPlan | None) -> None:
        """Set the plan of the forward pass that begins, on whatever stream it is launched on."""
        self.plan = plan
        self.separate = plan is not None and plan.separate
        self.activates = plan is not None and plan.activates
        if plan is not None:
            plan.start()


_numbers = count()
_groups: WeakValueDictionary[int, LinearGroup] = WeakValueDictionary()


class LinearGroup(nn.Module):
    """Linears with one input: their weights stacked, their outputs side by side."""

    def __init__(self, group: Group, linears: list[nn.Linear], context: AdapterContext) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.group = group
        self.context = context
        self.widths = [linear.out_features for linear in linears]
        self.weight = stack([linear.weight.data for linear in linears])
        self.bias = _stacked_bias(linears)
        self.float8 = Float8Weight.of(self.weight)
        self.number = torch.tensor(next(_numbers))
        _groups[int(self.number)] = self
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of the group's linear `index`; the product is made once for each input."""
        if self._input is not x:
            self._input = x
            rows = self._quantised(x)
            delta: Tensor | None = None
            if not torch.compiler.is_compiling():
                out, delta = self.compute(x, *rows)
            elif self.context.separate:
                out, delta = torch.ops.malora.separate_linear(
                    x, *rows, self.number, sum(self.widths)
                )
            else:
                out = torch.ops.malora.grouped_linear(x, *rows, self.number, sum(self.widths))
            self._outputs = list(out.split(self.widths, dim=-1))
            if delta is not None:  # the compiler joins this to what reads them
                deltas = delta.view(out.shape).split(self.widths, dim=-1)
                self._outputs = [a + b for a, b in zip(self._outputs, deltas, strict=True)]
        out = self._outputs[index]
        if index == len(self.widths) - 1:  # the last reader: hold nothing between steps
            self._input, self._outputs = None, []
        return out

    def activated(self, x: Tensor) -> Tensor:
        """silu(gate) · up of the group's two outputs, with adapters whose plan `activates`."""
        rows = self._quantised(x)
        if not torch.compiler.is_compiling():
            return self.compute_activated(x, *rows)
        width = self.widths[0]
        out: Tensor = torch.ops.malora.activated_linear(x, *rows, self.number, width)
        return out

    def _quantised(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        # Where the compiler joins it to what made x; the product is opaque to it.
        return (None, None) if self.float8 is None else quantise_rows(x)

    def compute(
        self, x: Tensor, rows: Tensor | None, scales: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """All the group's outputs side by side, (…, sum of the widths), of inputs (…, n).

        Where adapters are `separate`, without them, and what they add. rows, scales:
        `quantise_rows` of x, where the weight is float8.
        """
        plan = self.context.plan
        if plan is None:
            return self._base_product(x, rows, scales, F.linear), None
        base = partial(self._base_product, x, rows, scales)
        return plan.apply(x.view(-1, x.shape[-1]), self.group, base)

    def compute_activated(self, x: Tensor, rows: Tensor | None, scales: Tensor | None) -> Tensor:
        """`compute`, through the activation: (…, width of gate)."""
        plan = cast(ActivatingPlan, self.context.plan)
        base = partial(self._base_product, x, rows, scales)
        out = plan.activate(x.view(-1, x.shape[-1]), self.group, base)
        return out.view(*x.shape[:-1], -1)

    def _base_product(
        self, x: Tensor, rows: Tensor | None, scales: Tensor | None, linear: Linear
    ) -> Tensor:
        if self.float8 is None or rows is None or scales is None:
            return linear(x, self.weight, self.bias)
        return self.float8.product(rows, scales, self.bias, x.dtype)


# What compiled layers call. The group goes by number, in a tensor: as an attribute, it would be a
# constant of the compilation, and every layer would be compiled on its own.
@torch.library.custom_op("malora::grouped_linear", mutates_args=())
def _grouped_linear_op(
    x: Tensor,
    rows: Tensor | None,
    scales: Tensor | None,
    number: Tensor,
    width: int,  # noqa: ARG001
) -> Tensor:
    out, delta = _groups[int(number)].compute(x, rows, scales)
    assert delta is None
    return out


@torch.library.custom_op("malora::separate_linear", mutates_args=())
def _separate_linear_op(
    x: Tensor,
    rows: Tensor | None,
    scales: Tensor | None,
    number: Tensor,
    width: int,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    out, delta = _groups[int(number)].compute(x, rows, scales)
    assert delta is not None
    return out, delta


@torch.library.custom_op("malora::activated_linear", mutates_args=())
def _activated_linear_op(
    x: Tensor,
    rows: Tensor | None,
    scales: Tensor | None,
    number: Tensor,
    width: int,  # noqa: ARG001
) -> Tensor:
    return _groups[int(number)].compute_activated(x, rows, scales)


@_separate_linear_op.register_fake
def _(
    x: Tensor,
    rows: Tensor | None,  # noqa: ARG001
    scales: Tensor | None,  # noqa: ARG001
    number: Tensor,  # noqa: ARG001
    width: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], width)), x.new_empty((x.numel() // x.shape[-1], width))


@_activated_linear_op.register_fake
@_grouped_linear_op.register_fake
def _(
    x: Tensor,
    rows: Tensor | None,  # noqa: ARG001
    scales: Tensor | None,  # noqa: ARG001
    number: Tensor,  # noqa: ARG001
    width: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


class GroupedLinear(nn.Module):
    """Stands where one of the group's linears stood."""

    def __init__(self, group: LinearGroup, index: int) -> None:
        super().__init__()
        # In a list, so that the shared group is not registered (and counted) once a member.
        self._group = [group]
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self._group[0].output(self._index, x)


def _stacked_bias(linears: list[nn.Linear]) -> Tensor | None:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(linears) == 1 or not biases:
        return biases[0] if biases else None
    return torch.cat(
        [
            biases[0].new_zeros(linear.out_features) if linear.bias is None else linear.bias
            for linear in linears
        ]
    )


def group_linears(model: PreTrainedModel, context: AdapterContext) -> list[Group]:
    """Replace every linear inside the decoder layers; returns the groups in the model's order."""
    groups: list[Group] = []
    num_sites = 0
    for layer_path, layer_index, layer in decoder_layers(model):
        for path, parent in list(layer.named_modules()):
            names = [n for n, m in parent.named_children() if isinstance(m, nn.Linear)]
            prefix = ".".join(p for p in (layer_path, path) if p)
            for name in names:
                check_weight(f"{prefix}.{name}", getattr(parent, name).weight.data, model.dtype)
            for members in _fuse(parent, names):
                linears = [getattr(parent, name) for name in members]
                starts = [sum(m.out_features for m in linears[:i]) for i in range(len(linears))]
                sites = tuple(
                    Site(f"{prefix}.{name}", start, linear.out_features)
                    for name, start, linear in zip(members, starts, linears, strict=True)
                )
                group = Group(layer_index, linears[0].in_features, sites, num_sites)
                num_sites += len(sites)
                module = LinearGroup(group, linears, context)
                for i, (name, linear) in enumerate(zip(members, linears, strict=True)):
                    setattr(parent, name, GroupedLinear(module, i))
                    # At once, not when the linear is collected: torchao's hold themselves.
                    del linear.weight
                groups.append(group)
                if members == GATED and is_gated(parent):
                    layer.set_submodule(path, GatedMlp(parent, module))
    return groups


def _fuse(parent: nn.Module, names: list[str]) -> list[tuple[str, ...]]:
    fused = [
        family
        for family in FUSED
        if all(name in names for name in family)
        and can_stack([getattr(parent, name).weight.data for name in family])
    ]
    taken = {name for family in fused for name in family}
    return [*fused, *((name,) for name in names if name not in taken)]


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, int, nn.Module]]:
    """(path, index, module) of each decoder layer. Raises ValueError where there are none."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{path}.{i}", i, layer) for i, layer in enumerate(module)]
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers")
