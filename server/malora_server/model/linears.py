"""The base model's linears with the batch's adapters added to their outputs.

Linears that read the same input (q/k/v, gate/up) become one group: one base product, and one
plan of their adapters' rows. The model's own code is untouched: each of its linears is replaced by
a view of the group's output.
"""

from __future__ import annotations

from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from malora.kernels.batched import BatchPlan
from malora.kernels.resident import Group, Site

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Siblings that read the same input in the models of transformers."""


class AdapterContext:
    """What the linears read; the runner sets `plan` before each forward pass."""

    plan: BatchPlan | None = None


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
        if len(linears) == 1:
            self.weight, self.bias = linears[0].weight.data, linears[0].bias
        else:
            self.weight = torch.cat([linear.weight.data for linear in linears])
            self.bias = _stacked_bias(linears)
        self.number = torch.tensor(next(_numbers))
        _groups[int(self.number)] = self
        self._input: Tensor | None = None
        self._outputs: list[Tensor] = []

    def output(self, index: int, x: Tensor) -> Tensor:
        """The output of the group's linear `index`; the product is made once for each input."""
        if self._input is not x:
            self._input = x
            if torch.compiler.is_compiling():
                out = torch.ops.malora.grouped_linear(x, self.number, sum(self.widths))
            else:
                out = self.compute(x)
            self._outputs = list(out.split(self.widths, dim=-1))
        out = self._outputs[index]
        if index == len(self.widths) - 1:  # the last reader: hold nothing between steps
            self._input, self._outputs = None, []
        return out

    def compute(self, x: Tensor) -> Tensor:
        """All the group's outputs side by side, (…, sum of the widths), of inputs (…, n)."""
        plan = self.context.plan
        if plan is None:
            return F.linear(x, self.weight, self.bias)
        tokens = x.view(-1, x.shape[-1])
        plan.begin(tokens, self.group)
        out = F.linear(x, self.weight, self.bias)
        plan.add_to(out.view(-1, out.shape[-1]), tokens, self.group)
        return out


# What a compiled layer calls. The group goes by number, in a tensor: as an attribute, it would be a
# constant of the compilation, and every layer would be compiled on its own.
@torch.library.custom_op("malora::grouped_linear", mutates_args=())
def _grouped_linear_op(x: Tensor, number: Tensor, width: int) -> Tensor:  # noqa: ARG001
    return _groups[int(number)].compute(x)


@_grouped_linear_op.register_fake
def _(x: Tensor, number: Tensor, width: int) -> Tensor:  # noqa: ARG001
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
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
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
            for members in _fuse(names):
                linears = [getattr(parent, name) for name in members]
                prefix = ".".join(p for p in (layer_path, path) if p)
                starts = [sum(m.out_features for m in linears[:i]) for i in range(len(linears))]
                sites = tuple(
                    Site(f"{prefix}.{name}", start, linear.out_features)
                    for name, start, linear in zip(members, starts, linears, strict=True)
                )
                group = Group(layer_index, linears[0].in_features, sites, num_sites)
                num_sites += len(sites)
                module = LinearGroup(group, linears, context)
                for i, name in enumerate(members):
                    setattr(parent, name, GroupedLinear(module, i))
                groups.append(group)
    return groups


def _fuse(names: list[str]) -> list[tuple[str, ...]]:
    fused = [family for family in FUSED if all(name in names for name in family)]
    taken = {name for family in fused for name in family}
    return [*fused, *((name,) for name in names if name not in taken)]


def decoder_layers(model: PreTrainedModel) -> list[tuple[str, int, nn.Module]]:
    """(path, index, module) of each decoder layer. Raises ValueError where there are none."""
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{path}.{i}", i, layer) for i, layer in enumerate(module)]
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers")
