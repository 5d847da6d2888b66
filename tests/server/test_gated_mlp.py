"""MLPs whose activation a plan may make: which ones they are, and that it comes out the same."""

import copy

import pytest
import torch
import transformers
from torch import nn

from malora.format import AdaptedLinear
from malora.kernels.batched import Run
from malora.kernels.cpu import CpuPlan
from malora.kernels.large_batch import LargeBatchPlan
from malora.kernels.resident import ResidentAdapters
from malora_server.model.gated_mlp import GatedMlp, is_gated
from malora_server.model.linears import AdapterContext, group_linears

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Llama(nn.Module):
    """An MLP as Llama's, for others to differ from."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj = nn.Linear(6, 4)
        self.act_fn = activation or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(Llama):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)


class Swapped(Llama):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class OfTwo(Llama):
    def forward(self, x, y):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(y))


class Clamped(Llama):
    def forward(self, x):
        if x.max() > 1:
            x = x / x.max()
        return super().forward(x)


class WithNorm(Llama):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)


def test_only_that_code_is_taken_over():
    assert is_gated(Llama())
    for other in (
        Scaled(),
        Swapped(),
        OfTwo(),
        Clamped(),
        WithNorm(),
        Llama(nn.GELU()),
        nn.Linear(4, 4),
    ):
        assert not is_gated(other)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_plan_makes_what_the_model_makes(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    gpu_model = copy.deepcopy(model).to(GPU)
    context, gpu_context = AdapterContext(), AdapterContext()
    groups = group_linears(model, context)
    assert group_linears(gpu_model, gpu_context) == groups
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    of_cpu = ResidentAdapters(groups, torch.float32, memory)
    of_gpu = ResidentAdapters(groups, torch.float32, memory.to(GPU, copy=True))
    linears = {
        site.path: AdaptedLinear(
            basis=torch.randn(6, group.in_features) / 5,
            up=torch.randn(4, site.width, 2),
            coefficients=torch.randn(4, 2, 6) / 5,
            router=torch.randn(4, group.in_features),
            router_input="hidden",
            top_k=2,
            scaling=0.5,
        )
        for group in groups
        for site in group.sites
    }
    # Tokens of one adapter, of none, and of it again.
    spans = ((0, 3), (5, 80))
    on_cpu, on_gpu = of_cpu.add("a", linears), of_gpu.add("a", linears)
    of_model = CpuPlan([Run(*span, on_cpu) for span in spans], 81, torch.float32)
    plan = LargeBatchPlan(81, of_gpu)
    plan.load([Run(*span, on_gpu) for span in spans])
    assert plan.activates
    gpu_context.start(plan)
    x = torch.randn(1, 81, 32)
    for layer, gpu_layer in zip(model.model.layers, gpu_model.model.layers, strict=True):
        assert isinstance(gpu_layer.mlp, GatedMlp)
        context.start(of_model)
        want = layer.mlp(x)
        context.start(None)
        base = layer.mlp(x)
        got = gpu_layer.mlp(x.to(GPU)).cpu()
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)
        changed = (want != base).any(-1)[0]
        assert changed.tolist() == [True] * 3 + [False] * 2 + [True] * 75 + [False]
