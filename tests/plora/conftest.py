"""Tiny random decoders of five families, and an oracle for PLoRA made of plain forward hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from plora import PLoRAConfig, PLoRALinear, apply_plora

_SIZE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    # large enough that logits differ clearly
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_CONFIGS = {
    # its cache holds compressed keys, all of which an adapted layer expands again at every step
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_SIZE, "num_key_value_heads": 2},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,  # no experts: they refuse float64
    ),
    "llama": lambda: LlamaConfig(**_SIZE),
    "qwen2": lambda: Qwen2Config(**_SIZE),
    "qwen3": lambda: Qwen3Config(**_SIZE, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        initializer_range=0.4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
}
HIDDEN = 16


@pytest.fixture(params=sorted(_CONFIGS))
def base(request: pytest.FixtureRequest) -> nn.Module:
    """A float64 causal LM without PLoRA, in evaluation mode."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_CONFIGS[request.param]()).double().eval()


@pytest.fixture
def llama() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_CONFIGS["llama"]()).eval()


@pytest.fixture
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_CONFIGS["gpt2"]()).eval()


@pytest.fixture
def randomised() -> Callable[..., nn.Module]:
    """A function: a copy of a base model with PLoRA whose A and B are both random."""

    def make(base: nn.Module, **fields: object) -> nn.Module:
        config = PLoRAConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, **fields})
        model = apply_plora(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, PLoRALinear):
                for parameter in (module.lora_A, module.lora_B):
                    values = torch.randn(parameter.shape, generator=generator) * 0.5
                    parameter.data = values.to(base.dtype)
        return model

    return make


@pytest.fixture
def dense_oracle() -> Callable[..., object]:
    """A context: `base` computes PLoRA by dense masks, with A and B taken from `adapted`.

    Knows nothing of caches: it is for whole sequences only.
    """

    @contextmanager
    def oracle(base: nn.Module, adapted: nn.Module, mask: Tensor) -> Iterator[None]:
        handles = []
        for path, layer in adapted.named_modules():
            if isinstance(layer, PLoRALinear):

                def add(
                    _: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: nn.Module = layer
                ) -> Tensor:
                    update = 1.5 * args[0] @ layer.lora_A.T @ layer.lora_B.T
                    lead = args[0].shape[:-1]  # (batch, T), or (batch, 1, T), or (batch * T,)
                    length = lead[-1] if len(lead) > 1 else lead[0] // len(mask)
                    full = torch.zeros(len(mask), length, dtype=update.dtype)
                    full[:, : mask.shape[1]] = mask.to(update.dtype)[:, :length]
                    return output + full.view(*lead, 1) * update

                handles.append(base.get_submodule(path).register_forward_hook(add))
        assert handles
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return oracle


@pytest.fixture
def span() -> Callable[..., Tensor]:
    """A function: a (1, L) or (B, L) mask that is True on the given [start, stop) of each row."""

    def make(length: int, *spans: tuple[int, int]) -> Tensor:
        mask = torch.zeros(len(spans), length, dtype=torch.bool)
        for row, (start, stop) in enumerate(spans):
            mask[row, start:stop] = True
        return mask

    return make
