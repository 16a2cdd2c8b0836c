"""One row of the table: a model type built, its checks run, what was left out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from tests.decoders.build import build, entries
from tests.decoders.checks import run_checks
from tests.decoders.subject import Subject, first_line
from transformers.utils import logging

from plora import PLoRALinear, plora_mask, unadapted_layers


def examine(model_type: str) -> dict[str, Any]:
    """What is found of a model type.

    Returns:
        ``class``, and either ``missing``, why there is no small model to check, or ``parameters``,
        ``adapted`` (layers that PLoRA adapts), ``left_out`` (names of layers -> why not) and
        ``checks`` (check -> verdict).
    """
    logging.set_verbosity_error()
    found: dict[str, Any] = {"class": entries()[model_type][1].__name__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            base = build(model_type)
            subject = Subject(base)
            with torch.no_grad():
                base(input_ids=subject.ids)
        # Not narrower: each class fails in its own way where a package, a file or a size is not
        # as it wants. None is lost: it is recorded as missing, and the tests compare the record.
        except Exception as error:
            return found | {"missing": first_line(error)}
        left_out, adapted = _layers(subject)
    return found | {
        "parameters": sum(p.numel() for p in base.parameters()),
        "adapted": adapted,
        "left_out": left_out,
        "checks": run_checks(base),
    }


def failures(row: dict[str, Any]) -> dict[str, str]:
    """The checks of a row that PLoRA fails."""
    checks = row.get("checks", {})
    return {name: verdict for name, verdict in checks.items() if verdict.startswith("fails")}


def _layers(subject: Subject) -> tuple[dict[str, str], int]:
    """Layers of PLoRA's decoder that are not adapted, by name without numbers, and how many are."""
    model = subject.adapted()
    try:
        with plora_mask(subject.mask), torch.no_grad():
            model(input_ids=subject.ids)
    except ValueError:  # no layer at all is adapted, which the checks say as well
        pass
    reasons = unadapted_layers(model)
    adapted = sum(
        isinstance(module, PLoRALinear) and path not in reasons
        for path, module in model.named_modules()
    )
    left_out = {re.sub(r"\.\d+(?=\.|$)", ".N", path): _short(why) for path, why in reasons.items()}
    # matrices of several experts in one parameter, which is no linear layer
    if any(p.ndim == 3 and "expert" in name for name, p in model.named_parameters()):
        left_out["experts"] = "one parameter for all"
    return left_out, adapted


def _short(reason: str) -> str:
    if reason.startswith("hidden_states"):
        return "sees no positions"
    return "not called" if "did not call" in reason else reason
