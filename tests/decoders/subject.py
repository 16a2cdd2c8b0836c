"""What the checks share: a base model, copies of it with PLoRA, inputs, and an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plora import PLoRAConfig, PLoRALinear, apply_plora

BATCH, LENGTH = 2, 12
CONFIG = PLoRAConfig(r=2, lora_alpha=3, lora_dropout=0.0)


class Subject:
    """A base model, copies of it with PLoRA, and the inputs that all checks share."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base.requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 60, (BATCH, LENGTH), generator=generator)
        self.mask = spans((5, 8), (7, 12))
        self.early_mask = spans((0, 4), (4, 8))

    def adapted(self, *, randomised: bool = True) -> nn.Module:
        """A copy with PLoRA; A and B random, or B zero."""
        model = apply_plora(copy.deepcopy(self.base), CONFIG)
        generator = torch.Generator().manual_seed(2)
        for layer in layers_of(model).values():
            layer.lora_A.data = torch.randn(layer.lora_A.shape, generator=generator) * 0.3
            if randomised:
                layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=generator) * 0.3
        return model


def spans(*pairs: tuple[int, int]) -> Tensor:
    mask = torch.zeros(len(pairs), LENGTH, dtype=torch.bool)
    for row, (start, stop) in enumerate(pairs):
        mask[row, start:stop] = True
    return mask


def layers_of(model: nn.Module) -> dict[str, PLoRALinear]:
    return {path: m for path, m in model.named_modules() if isinstance(m, PLoRALinear)}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


@contextmanager
def oracle(
    base: nn.Module, matrices: dict[str, tuple[Tensor, Tensor]], mask: Tensor
) -> Iterator[None]:
    """`base` with a dense update added behind every layer that sees the whole sequence."""
    handles = []
    for path, (lora_a, lora_b) in matrices.items():

        def add(
            _: nn.Module,
            args: tuple[Tensor, ...],
            output: object,
            lora_a: Tensor = lora_a,
            lora_b: Tensor = lora_b,
        ) -> object:
            lead = args[0].shape[:-1]
            if lead not in ((BATCH, LENGTH), (BATCH * LENGTH,), (BATCH, 1, LENGTH)):
                return output
            if not isinstance(output, Tensor) or output.shape != (*lead, lora_b.shape[0]):
                return output
            update = CONFIG.scaling * args[0] @ lora_a.T @ lora_b.T
            return output + update * mask.view(*lead, 1)

        handles.append(base.get_submodule(path).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrices_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        path: (
            layer.lora_A.detach().clone().requires_grad_(),
            layer.lora_B.detach().clone().requires_grad_(),
        )
        for path, layer in layers_of(model).items()
    }


def loss_of(output: Tensor) -> Tensor:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    return (output * weights).sum() / output.shape[-1]


def off_by(ours: Tensor, truth: Tensor) -> float:
    """Largest difference, as a part of the largest value."""
    return ((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-6)).item()


def attempt(run: Callable[[], object]) -> object:
    """What `run` returns, or what it raises, as a line of text."""
    try:
        return run()
    # Not narrower: any of 180 models may raise anything, and the sweep goes on with the next one.
    # None is lost: callers turn the line into a verdict, "fails" unless the base model raises too.
    except Exception as error:
        return f"raises {first_line(error)}"


def first_line(error: Exception) -> str:
    """An error's kind and the beginning of its text, without what changes from run to run."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:140] if lines else ''}".replace("|", "/")
