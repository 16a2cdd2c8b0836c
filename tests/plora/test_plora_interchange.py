"""PEFT's adapters as PLoRA and PLoRA's in PEFT: the same numbers with every position masked."""

from __future__ import annotations

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn

from plora import (
    PLoRAConfig,
    PLoRALinear,
    apply_plora,
    load_plora,
    plora_state_dict,
    remove_plora,
    save_plora,
)

peft = pytest.importorskip("peft")
# peft 0.21 asks transformers 5.23 for a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NAMES = ["q_proj", "v_proj", "up_proj", "c_attn", "c_fc"]
CASES = {
    "rank and alpha": {"r": 3, "lora_alpha": 5, "target_modules": NAMES},
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "regular expression": {"r": 3, "target_modules": r".*\.(q_proj|c_attn)"},
    "rslora": {"r": 3, "lora_alpha": 5, "target_modules": NAMES, "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": NAMES,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.1\..*v_proj": 4, "c_fc": 1},
        "alpha_pattern": {"v_proj": 7, "h.0.attn.c_attn": 2},
    },
    "exclude": {"r": 3, "target_modules": NAMES, "exclude_modules": ["v_proj", "0.attn.c_attn"]},
    "layers": {"r": 3, "target_modules": NAMES, "layers_to_transform": [1]},
    "list of layers": {
        "r": 3,
        "target_modules": NAMES,
        "layers_to_transform": 0,
        "layers_pattern": ["layers", "h"],
    },
    "dora": {"r": 3, "lora_alpha": 5, "target_modules": NAMES, "use_dora": True},
}


@pytest.fixture(params=["llama", "gpt2"])
def base(request, llama, gpt2):
    """Linear layers, and GPT-2's transposed ones, whose fan PEFT is told of."""
    return {"llama": llama, "gpt2": gpt2}[request.param].double()


@pytest.fixture(params=sorted(CASES))
def fields(request, base):
    """Fields of a configuration, PEFT's and ours, with the names that this model has."""
    given = {"lora_alpha": 8, "lora_dropout": 0.0, **CASES[request.param]}
    paths = [path for path, _ in base.named_modules()]

    def present(name):
        return any(re.fullmatch(rf"(.*\.)?({name})", path) for path in paths)

    for field, value in given.items():
        if isinstance(value, list) and field != "layers_pattern" and isinstance(value[0], str):
            given[field] = [name for name in value if present(name)]
        elif isinstance(value, dict):
            given[field] = {name: number for name, number in value.items() if present(name)}
    return given


def randomise(model: nn.Module) -> None:
    torch.manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_magnitude" in name:
            parameter.data += torch.rand_like(parameter)
        elif "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def of_peft(base: nn.Module, fields: dict) -> nn.Module:
    known = {key: copy.copy(value) for key, value in fields.items()}
    fan = base.config.model_type == "gpt2"
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=fan, **known)
    model = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    randomise(model.double())
    return model.eval()


def widened(model: nn.Module) -> nn.Module:
    """A and B in float64, as the base model is."""
    for layer in model.modules():
        if isinstance(layer, PLoRALinear):
            layer.double()
    return model


@pytest.fixture
def ids():
    return torch.arange(10).view(2, 5)


def same(ours, theirs, dora: bool) -> None:
    if dora:  # PEFT multiplies B A by passing the unit matrix through both
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    else:
        assert torch.equal(ours, theirs)


def test_a_folder_of_peft_loads_as_plora(base, fields, ids, span, tmp_path):
    theirs = of_peft(base, fields)
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "plora_config.json").exists()
    ours = widened(load_plora(copy.deepcopy(base), tmp_path))
    load_plora(ours, tmp_path)
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == plora_state_dict(ours).keys()
    everywhere = span(5, (0, 5), (0, 5))
    expected = theirs(input_ids=ids).logits
    same(ours(input_ids=ids, plora_mask=everywhere).logits, expected, "use_dora" in fields)
    plain = base(input_ids=ids).logits
    assert not torch.allclose(expected, plain)
    # ... and of it only the masked positions
    masked = ours(input_ids=ids, plora_mask=span(5, (2, 5), (3, 5))).logits
    assert torch.equal(masked[0, :2], plain[0, :2])
    assert torch.equal(masked[1, :3], plain[1, :3])
    assert not torch.equal(masked[0, 2:], plain[0, 2:])


@pytest.mark.parametrize("how", ["gaussian", "orthogonal", "mica"])
def test_initialisers_that_leave_the_base_model_alone_are_read(llama, ids, span, tmp_path, how):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=how)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_plora(llama, tmp_path)
    everywhere = span(5, (0, 5), (0, 5))
    expected = theirs.eval()(input_ids=ids).logits
    assert torch.equal(ours(input_ids=ids, plora_mask=everywhere).logits, expected)


def test_the_same_layers_are_taken_and_peft_loads_them(base, fields, ids, span, tmp_path):
    theirs = of_peft(base, fields)
    ours = apply_plora(copy.deepcopy(base), PLoRAConfig.from_dict(fields))
    randomise(widened(ours))
    assert peft.get_peft_model_state_dict(theirs).keys() == plora_state_dict(ours).keys()
    save_plora(ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what PEFT says of missing or unknown names
        again = peft.PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False
        )
    found = again.double()(input_ids=ids).logits
    ours_found = ours(input_ids=ids, plora_mask=span(5, (0, 5), (0, 5))).logits
    same(ours_found, found, "use_dora" in fields)


def test_modalities_are_one_adapter_of_peft_each(llama, ids, span, tmp_path):
    configs = {
        "audio": PLoRAConfig(r=3, lora_dropout=0.0, target_modules=["q_proj"]),
        "vision": PLoRAConfig(r=2, lora_dropout=0.0, target_modules=["q_proj", "up_proj"]),
    }
    model = apply_plora(copy.deepcopy(llama), configs)
    randomise(model)
    save_plora(model, tmp_path)
    again = load_plora(copy.deepcopy(llama), tmp_path)
    ours, loaded = plora_state_dict(model), plora_state_dict(again)
    assert ours.keys() == loaded.keys()
    assert all(torch.equal(ours[name], loaded[name]) for name in ours)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.audio.weight" in ours
    everywhere = span(5, (0, 5), (0, 5))
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(llama), tmp_path / "audio", adapter_name="audio"
    )
    theirs.load_adapter(tmp_path / "vision", adapter_name="vision")
    for name in configs:
        theirs.set_adapter(name)
        expected = theirs(input_ids=ids).logits
        assert torch.equal(again(input_ids=ids, plora_mask={name: everywhere}).logits, expected)
    with pytest.raises(ValueError, match=r"expected PLoRA with audio: r=3 .*; vision: r=2"):
        load_plora(apply_plora(remove_plora(again), configs["audio"]), tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", "expected peft_type LORA"),
        ("bias", "all", "expected bias to be 'none'"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("lora_bias", True, "lora_bias"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "olora", "which changes the base model as well"),
        ("init_lora_weights", "loftq", "which changes the base model as well"),
        ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens"),
        ("target_modules", ["q_proj", "lm_head"], "'lm_head' matches no layer inside the decoder"),
    ],
)
def test_what_plora_cannot_do_is_refused(llama, randomised, tmp_path, field, value, message):
    save_plora(randomised(llama, target_modules=["q_proj"]), tmp_path)
    (tmp_path / "plora_config.json").unlink()
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message):
        load_plora(llama, tmp_path)
    assert not any(isinstance(module, PLoRALinear) for module in llama.modules())
