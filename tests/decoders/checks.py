"""What PLoRA promises, asked of one model; the base model is asked too where it may fall short.

A verdict is "pass", or "base: ..." where the base model itself, without PLoRA, falls short in the
same way, or "fails: ...". What PLoRA should compute comes from an oracle of plain forward hooks on
the base model, which knows neither caches nor checkpoints.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from tests.decoders.subject import (
    LENGTH,
    Subject,
    attempt,
    layers_of,
    logits,
    loss_of,
    matrices_of,
    off_by,
    oracle,
)
from torch import Tensor, nn

from plora import load_plora, plora_disabled, plora_mask, remove_plora, save_plora

PASS = "pass"
# As a part of the largest value, in float32: the oracle adds the update in another order
CLOSE = 2e-4


def zero_and_off(subject: Subject) -> str:
    """Zero-initialised, without a mask, with an empty one and disabled: the base, to the bit."""
    with torch.no_grad():
        expected = logits(subject.base, subject.ids)
        if not torch.equal(logits(subject.base, subject.ids), expected):
            return "base: two calls differ"
        model = subject.adapted(randomised=False)
        with plora_mask(subject.mask):
            if not torch.equal(logits(model, subject.ids), expected):
                return "fails: with B = 0 it is not the base"
        model = subject.adapted()
        if not torch.equal(logits(model, subject.ids), expected):
            return "fails: without a mask it is not the base"
        with plora_mask(subject.mask & False):
            if not torch.equal(logits(model, subject.ids), expected):
                return "fails: with an empty mask it is not the base"
        with plora_mask(subject.mask), plora_disabled(model):
            if not torch.equal(logits(model, subject.ids), expected):
                return "fails: disabled, it is not the base"
    return PASS


def prefix(subject: Subject) -> str:
    """Before the first masked position nothing changes; at every masked one something does."""
    with torch.no_grad():
        expected = logits(subject.base, subject.ids)
        with plora_mask(subject.mask):
            ours = logits(subject.adapted(), subject.ids)
    changed = (ours != expected).any(-1)
    if not changed[subject.mask].all():
        return "fails: a masked position does not change"
    first = subject.mask.int().argmax(1)
    before = torch.arange(LENGTH) < first[:, None]
    if not changed[before].any():
        return PASS
    # what the base does when the tokens from the first masked position on are others
    base_off = 0.0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(3, 60, subject.ids.shape, generator=generator)
        with torch.no_grad():
            others = logits(subject.base, torch.where(before, subject.ids, drawn))
        base_off = max(base_off, off_by(others[before], expected[before]))
    ours_off = off_by(ours[before], expected[before])
    if base_off > CLOSE:
        return "base: not causal"
    if base_off > 0 and ours_off <= CLOSE:
        return "base: later tokens change the rounding of earlier ones"
    return f"fails: a position before the mask changes by {ours_off:.1e}"


def gradients(subject: Subject) -> str:
    """Values and gradients are those of the oracle; A and B alone get any, and not all zero."""
    model = subject.adapted()
    base = copy.deepcopy(subject.base).requires_grad_(False)
    matrices = matrices_of(model)
    base.train()
    model.train()
    with oracle(base, matrices, subject.mask):
        truth = logits(base, subject.ids)
    with plora_mask(subject.mask):
        ours = logits(model, subject.ids)
    if off_by(ours, truth) > CLOSE:
        return f"fails: off the dense formula by {off_by(ours, truth):.1e}"
    wanted = [one for pair in matrices.values() for one in pair]
    truth_grads = attempt(lambda: torch.autograd.grad(loss_of(truth), wanted, allow_unused=True))
    raised = attempt(lambda: loss_of(ours).backward())
    if isinstance(truth_grads, str) or isinstance(raised, str):
        trained = copy.deepcopy(subject.base).train()
        theirs = attempt(lambda: loss_of(logits(trained, subject.ids)).backward())
        if isinstance(theirs, str):
            return f"base: backward {theirs}"
        return f"fails: {raised if isinstance(raised, str) else 'no layer sees the sequence'}"
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    if stray := {name for name in with_gradient if "lora_" not in name}:
        return f"fails: {min(stray)} gets a gradient"
    found = [p for layer in layers_of(model).values() for p in (layer.lora_A, layer.lora_B)]
    names = [f"{path}.{x}" for path in matrices for x in "AB"]
    scale = max((g.abs().max().item() for g in truth_grads if g is not None), default=0.0)
    if scale == 0:
        return "fails: all gradients are zero"
    for name, parameter, grad in zip(names, found, truth_grads, strict=True):
        ours_grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        truth_grad = torch.zeros_like(parameter) if grad is None else grad
        if truth_grad.any() and not ours_grad.any():
            return f"fails: {name} gets no gradient"
        if (ours_grad - truth_grad).abs().max() > CLOSE * scale:
            return f"fails: the gradient of {name} is off the oracle's"
    return PASS


def generation(subject: Subject) -> str:
    """Greedy generation with the cache is that without."""
    model, base, ids = subject.adapted(), subject.base, subject.ids
    for mask in (subject.early_mask, subject.mask):
        with plora_mask(mask):
            ours = attempt(lambda: [_generate(model, ids, use_cache=c) for c in (True, False)])
        if not isinstance(ours, str) and torch.equal(*ours):
            continue
        theirs = attempt(lambda: [_generate(base, ids, use_cache=c) for c in (True, False)])
        if isinstance(theirs, str):
            return f"base: generate {theirs}"
        if isinstance(ours, str):
            return f"fails: {ours}"
        if torch.equal(*theirs):
            return "fails: cached is not uncached"
        # the oracle acts on whole prompts only, so that it says what the cached way should give
        with oracle(base, matrices_of(model), mask):
            if not torch.equal(_generate(base, ids), ours[0]):
                return "fails: cached is not the oracle's"
        return "base: cached and uncached generation differ"
    return PASS


def padding(subject: Subject) -> str:
    """A prompt with padding on its left generates what it does without."""
    short = subject.ids[:1, 4:]
    attention_mask = torch.ones_like(subject.ids[:1])
    attention_mask[:, :4] = 0

    def both(model: nn.Module) -> object:
        with plora_mask(subject.mask[:1, 4:]):
            alone = attempt(lambda: _generate(model, short)[:, short.shape[1] :])
        with plora_mask(subject.mask[:1]):
            padded = attempt(
                lambda: _generate(
                    model, subject.ids[:1] * attention_mask, attention_mask=attention_mask
                )[:, LENGTH:]
            )
        if isinstance(alone, str) or isinstance(padded, str):
            return alone if isinstance(alone, str) else padded
        return None if torch.equal(alone, padded) else "padding changes what is generated"

    ours = both(subject.adapted())
    if ours is None:
        return PASS
    theirs = both(subject.base)
    return f"fails: {ours}" if theirs is None else f"base: {theirs}"


def _generate(
    model: nn.Module, ids: Tensor, *, attention_mask: Tensor | None = None, use_cache: bool = True
) -> Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if attention_mask is None else attention_mask,
        use_cache=use_cache,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )


def checkpointing(subject: Subject, *, use_reentrant: bool) -> str:
    """Gradients under the model's own gradient checkpointing are those without."""
    if not subject.base.supports_gradient_checkpointing:
        return "base: has no gradient checkpointing"

    def grads(model: nn.Module, on: bool, around: Callable[[], object]) -> dict[str, Tensor]:
        model = copy.deepcopy(model).train()
        if on:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
        with around():
            output = model(input_ids=subject.ids, use_cache=False).logits
        loss_of(output).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    def compare(model: nn.Module, around: Callable[[], object]) -> str | None:
        plain = attempt(lambda: grads(model, False, around))
        ours = attempt(lambda: grads(model, True, around))
        if isinstance(plain, str) or isinstance(ours, str):
            return ours if isinstance(ours, str) else str(plain)
        scale = max(g.abs().max().item() for g in plain.values() if g is not None)
        for name, grad in plain.items():
            if grad is None and ours[name] is None:
                continue
            if grad is None or ours[name] is None:
                if (ours[name] if grad is None else grad).any():
                    return f"{name} gets {'no' if ours[name] is None else 'a'} gradient"
            elif (grad - ours[name]).abs().max() > 1e-5 * scale:
                return f"the gradient of {name} differs"
        return None

    wrong = compare(subject.adapted(), lambda: plora_mask(subject.mask))
    if wrong is None:
        return PASS
    # as with PLoRA, nothing below the first adapted layer asks for a gradient
    base = copy.deepcopy(subject.base).requires_grad_(False)
    for path in layers_of(subject.adapted()):
        base.get_submodule(path).requires_grad_(True)
    base_wrong = compare(base, nullcontext)
    return f"base: {base_wrong} (PLoRA: {wrong})" if base_wrong is not None else f"fails: {wrong}"


def storage(subject: Subject) -> str:
    """Saved and loaded it is the same model; removed, it is the base; both to the bit."""
    model = subject.adapted()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), plora_mask(subject.mask):
        save_plora(model, Path(folder))
        loaded = load_plora(copy.deepcopy(subject.base), Path(folder))
        if not torch.equal(logits(loaded, subject.ids), logits(model, subject.ids)):
            return "fails: loaded, it is another model"
    remove_plora(model)
    expected, found = subject.base.state_dict(), model.state_dict()
    if list(expected) != list(found):
        return "fails: removed, it has other names"
    if not all(torch.equal(expected[name], found[name]) for name in expected):
        return "fails: removed, it has other values"
    kinds = [[(name, type(m)) for name, m in one.named_modules()] for one in (subject.base, model)]
    if kinds[0] != kinds[1]:
        return "fails: removed, it has other modules"
    if not all(p.requires_grad for p in model.parameters()):
        return "fails: removed, it is frozen"
    with torch.no_grad():
        if not torch.equal(logits(model, subject.ids), logits(subject.base, subject.ids)):
            return "fails: removed, it is not the base"
    return PASS


CHECKS: dict[str, Callable[[Subject], str]] = {
    "zero and off": zero_and_off,
    "prefix": prefix,
    "gradients": gradients,
    "generation": generation,
    "left padding": padding,
    "reentrant": lambda subject: checkpointing(subject, use_reentrant=True),
    "non-reentrant": lambda subject: checkpointing(subject, use_reentrant=False),
    "storage": storage,
}


def run_checks(base: nn.Module) -> dict[str, str]:
    """The verdict of each check on `base`."""
    subject = Subject(base)
    verdicts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in CHECKS.items():
            verdict = str(attempt(lambda check=check: check(subject)))
            verdicts[name] = verdict if not verdict.startswith("raises") else f"fails: {verdict}"
    return verdicts
