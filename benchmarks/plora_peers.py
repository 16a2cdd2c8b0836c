"""Partial LoRA as others do it, for benchmarks.plora: one linear layer, and a small decoder.

Shapes: B batch, T positions, K input features, N output features, r the rank.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plora import PLoRAConfig, PLoRALinear, apply_plora, plora_mask

# What the errors of output and gradients, relative to the norm, may be: 16-bit results are rounded
# at each of a few steps.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Layer(nn.Module):
    """A decoder of one linear layer; it has the signature that PLoRA and PEFT look for."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.linear(inputs_embeds)


class Problem(NamedTuple):
    """What all implementations compute: ``base(x) + m * B A dropout(x)``.

    Attributes:
        base: The frozen layer.
        a: (r, K) float32.
        b: (N, r) float32.
        span: (B, T) bool, one run of positions in each sequence.
        scattered: (B, T) bool, as many, anywhere.
        dropout: While training.
    """

    base: nn.Linear
    a: Tensor
    b: Tensor
    span: Tensor
    scattered: Tensor
    dropout: float


class Implementation(NamedTuple):
    """One way to compute it.

    Attributes:
        run: From x, (B, T, K), to (B, T, N).
        parameters: A and B, which learn; none in the base layer.
        mask: What it adapts, (B, T); None where it adapts every position, or nothing.
    """

    run: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    mask: Tensor | None


def base_layer(problem: Problem) -> Implementation:
    """The frozen layer alone: nothing costs less."""
    return Implementation(problem.base, [], None)


def ours(problem: Problem, mask: Tensor, backend: str) -> Implementation:
    """`plora`, its mask included."""
    config = PLoRAConfig(r=len(problem.a), lora_alpha=len(problem.a), lora_dropout=problem.dropout)
    model = apply_plora(Layer(problem.base), config, backend=backend)
    layer = model.linear
    assert isinstance(layer, PLoRALinear)
    parameters = list(layer.trained().values())
    with torch.no_grad():
        for parameter, value in zip(parameters, (problem.a, problem.b), strict=True):
            parameter.copy_(value)

    def run(x: Tensor) -> Tensor:
        with plora_mask(mask):
            return model(inputs_embeds=x)

    return Implementation(run, parameters, mask)


def peft_lora(problem: Problem, *, float32_adapter: bool) -> Implementation:
    """PEFT's LoRA, which adapts every position; by default its A and B stay float32."""
    import peft

    config = peft.LoraConfig(
        r=len(problem.a),
        lora_alpha=len(problem.a),
        lora_dropout=problem.dropout,
        target_modules=["linear"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the model has no configuration
        model = peft.get_peft_model(
            Layer(problem.base), config, autocast_adapter_dtype=float32_adapter
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(parameters, (problem.a, problem.b), strict=True):
            parameter.copy_(value)
    return Implementation(model.base_model.model, parameters, torch.ones_like(problem.span))


def dense_mask(problem: Problem) -> Implementation:
    """The formula as it is written: an update of every position, times the mask."""
    a, b = (nn.Parameter(value.clone()) for value in (problem.a, problem.b))

    def run(x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, problem.dropout) if problem.dropout else x
        update = (dropped @ a.to(x.dtype).mT) @ b.to(x.dtype).mT
        return problem.base(x) + problem.span[..., None] * update

    return Implementation(run, [a, b], problem.span)


IMPLEMENTATIONS: dict[str, Callable[[Problem], Implementation]] = {
    "base layer": base_layer,
    "plora, one span": lambda problem: ours(problem, problem.span, "torch"),
    "plora, scattered": lambda problem: ours(problem, problem.scattered, "torch"),
    "plora, triton": lambda problem: ours(problem, problem.scattered, "triton"),
    "PEFT": lambda problem: peft_lora(problem, float32_adapter=False),
    "PEFT, float32 adapter": lambda problem: peft_lora(problem, float32_adapter=True),
    "dense mask": dense_mask,
}


def why_not(name: str, dtype: torch.dtype, device: str) -> str | None:
    """Why an implementation cannot be measured."""
    if name == "plora, triton" and device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "Triton's interpreter (TRITON_INTERPRET=1) says nothing about speed"
        return "its kernels need a GPU"
    if name.startswith("PEFT") and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if name == "PEFT, float32 adapter" and dtype == torch.float32:
        return "the same as PEFT"
    return None


def truth(
    problem: Problem, implementation: Implementation, x: Tensor, upstream: Tensor
) -> list[Tensor]:
    """Output, dx, dA and dB in float64; without dropout."""
    weight = problem.base.weight.double()
    leaves = [t.detach().double().requires_grad_() for t in (x, problem.a, problem.b)]
    out = leaves[0] @ weight.mT
    if problem.base.bias is not None:
        out = out + problem.base.bias.double()
    if implementation.mask is not None:
        out = out + implementation.mask[..., None] * (leaves[0] @ leaves[1].mT @ leaves[2].mT)
    wanted = leaves if implementation.parameters else leaves[:1]
    return [out.detach(), *torch.autograd.grad(out, wanted, upstream.double())]


def decoders(width: int, layers: int, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """A small Llama: the base model, with PLoRA and no position adapted, and with PEFT.

    PEFT is there twice: adapting, as it does in every decoding step, and with the adapter disabled.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        num_key_value_heads=max(1, width // 256),
        pad_token_id=0,
    )
    base = LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)
    models: dict[str, nn.Module] = {"base model": base}
    models["plora, mask off"] = apply_plora(copy.deepcopy(base), PLoRAConfig(r=16)).eval()
    if importlib.util.find_spec("peft") is not None:
        import peft

        names = [n.rpartition(".")[2] for n, m in base.model.named_modules() if "proj" in n]
        made = peft.LoraConfig(r=16, lora_alpha=16, target_modules=sorted(set(names)))
        for label in ("PEFT", "PEFT, disabled"):
            models[label] = peft.get_peft_model(copy.deepcopy(base), made).eval()
        models["PEFT, disabled"].base_model.disable_adapter_layers()
    return models
