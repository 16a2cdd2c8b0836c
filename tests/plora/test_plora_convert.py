"""Names and scales of InternLM-XComposer2 and BLSP-Emo, against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plora import (
    apply_plora,
    from_blsp_emo,
    from_internlm_xcomposer2,
    load_plora_state_dict,
    plora_mask,
)

WIDTH = 12


class Block(nn.Module):
    """A layer whose linear layers carry the names of either code."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            part, _, leaf = name.rpartition(".")
            if not hasattr(self, part):
                self.add_module(part, nn.Module())
            self.get_submodule(part).add_module(leaf, nn.Linear(WIDTH, WIDTH))
        self.names = names

    def forward(self, x):
        for name in self.names:
            x = x + self.get_submodule(name)(x)
        return x


class Model(nn.Module):
    """Two such layers at ``<path>.0`` and ``<path>.1``."""

    def __init__(self, path, names):
        super().__init__()
        outer, _, inner = path.partition(".")
        self.add_module(outer, nn.Module())
        self.get_submodule(outer).add_module(inner, nn.ModuleList([Block(names), Block(names)]))
        self.path = path

    def forward(self, inputs_embeds):
        for layer in self.get_submodule(self.path):
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


XCOMPOSER = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2")
BLSP = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.c_proj")


def checkpoint(model, prefix, suffix, names, ranks):
    """Random A and B under the names of a checkpoint, and by path."""
    values, pairs = {f"{prefix}{n}": p for n, p in model.state_dict().items()}, {}
    for layer in range(2):
        for name in names:
            path = f"{model.path}.{layer}.{name}"
            a, b = torch.randn(ranks(name), WIDTH), torch.randn(WIDTH, ranks(name))
            values[f"{prefix}{path}.{suffix.format('A')}"] = a
            values[f"{prefix}{path}.{suffix.format('B')}"] = b
            pairs[path] = (a, b)
    return values, pairs


def expected(model, pairs, scale, x, mask):
    """`model` with scale(rank) B A x added on the masked positions."""

    def add(_, args, output, a, b):
        return output + scale(len(a)) * mask[..., None] * (args[0] @ a.T @ b.T)

    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda *args, a=a, b=b: add(*args[:3], a=a, b=b)
        )
        for path, (a, b) in pairs.items()
    ]
    out = model(x)
    for handle in handles:
        handle.remove()
    return out


def check(model, pairs, scale, config, values):
    x, mask = torch.randn(2, 5, WIDTH), torch.rand(2, 5) < 0.5
    truth = expected(model, pairs, scale, x, mask)
    load_plora_state_dict(apply_plora(model, config), values)
    with plora_mask(mask):
        found = model.eval()(x)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item())


@pytest.mark.parametrize("rank_of_qkv", [256, 8])
def test_internlm_xcomposer2(rank_of_qkv):
    torch.manual_seed(0)
    model = Model("model.layers", XCOMPOSER)

    def ranks(name):
        return rank_of_qkv if name.endswith("wqkv") else 256

    values, pairs = checkpoint(model, "", "Plora_{}.weight", XCOMPOSER, ranks)
    values["vision_proj.0.weight"] = torch.zeros(1)
    config, values = from_internlm_xcomposer2(values)
    assert config.target_modules == tuple(sorted(XCOMPOSER))
    # its code: scale 1 at rank 256, and 16 / 8 at rank 8, the fused projection of the 4KHD model
    check(model, pairs, lambda rank: {256: 1.0, 8: 2.0}[rank], config, values)


@pytest.mark.parametrize(("lora_config", "alpha"), [(None, 16), ({"r": 4, "lora_alpha": 6}, 6)])
def test_blsp_emo(lora_config, alpha):
    torch.manual_seed(0)
    model = Model("transformer.h", BLSP)
    values, pairs = checkpoint(
        model, "qwen_model.model.", "lora_{}.default.weight", BLSP, lambda _: 4
    )
    values["whisper_model.layers.0.fc1.weight"] = torch.zeros(1)
    config, values = from_blsp_emo(values, lora_config=lora_config)
    assert config.target_modules == tuple(sorted(BLSP))
    check(model, pairs, lambda rank: alpha / rank, config, values)


def test_layers_that_differ_are_named_one_by_one():
    values = {
        f"model.layers.{path}.Plora_{kind}.weight": torch.ones(3, 3)
        for path in ("0.attention.wo", "1.attention.wqkv")
        for kind in "AB"
    }
    config, _ = from_internlm_xcomposer2(values, lora_alpha=3)
    assert config.target_modules == (
        "model.layers.0.attention.wo",
        "model.layers.1.attention.wqkv",
    )


PAIR = {"l.0.w.Plora_A.weight": torch.ones(8, 3), "l.0.w.Plora_B.weight": torch.ones(5, 8)}
EMO = {
    "h.0.w.lora_A.default.weight": torch.ones(4, 3),
    "h.0.w.lora_B.default.weight": torch.ones(5, 4),
}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_internlm_xcomposer2({"l.0.w.weight": PAIR}), "got none of them"),
        (lambda: from_internlm_xcomposer2(EMO), "'h.0.w.lora_A.default.weight' is a LoRA under"),
        (
            lambda: from_internlm_xcomposer2({**PAIR, "l.0.w.MPlora_A.weight": torch.ones(1)}),
            "MPlora_A.weight' is a LoRA under a name",
        ),
        (lambda: from_internlm_xcomposer2(dict([*PAIR.items()][:1])), r"got \{'A': \(8, 3\)\}"),
        (
            lambda: from_internlm_xcomposer2(
                {"l.0.w.Plora_A.weight": torch.ones(7, 3), "l.0.w.Plora_B.weight": torch.ones(5, 7)}
            ),
            "beside rank 7",
        ),
        (lambda: from_blsp_emo(PAIR), "is a LoRA under a name"),
        (lambda: from_blsp_emo(EMO, lora_config={"r": 8}), "expected r to be the rank"),
        (
            lambda: from_blsp_emo({**EMO, "h.0.w.lora_B.default.weight": torch.ones(5, 3)}),
            r"expected A \(r, K\) and B \(N, r\)",
        ),
    ],
)
def test_what_is_not_known_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()
