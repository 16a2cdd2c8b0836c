"""Which model is meant: the one given to apply_plora, one around it, or a part of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from plora import (
    PLoRAConfig,
    apply_plora,
    load_plora,
    load_plora_state_dict,
    plora_state_dict,
    remove_plora,
    save_plora,
    unadapted_layers,
)


class Parallel(nn.Module):
    """Holds its model as DistributedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "data parallel": Parallel,
    "both": lambda model: Parallel(torch.compile(model, backend="eager")),
    "container": lambda model: nn.ModuleDict({"llm": model}),
}


@pytest.mark.parametrize("wrap", sorted(WRAPPERS))
def test_what_is_around_the_model_is_in_no_name(llama, randomised, tmp_path, wrap):
    model = randomised(llama)
    wrapped = WRAPPERS[wrap](model)
    save_plora(model, tmp_path / "plain")
    save_plora(wrapped, tmp_path / "wrapped")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == 4
    for name in names:
        one, other = ((tmp_path / folder / name).read_bytes() for folder in ("plain", "wrapped"))
        assert one == other, name
    assert load_file(tmp_path / "plain" / "adapter_model.safetensors").keys() == (
        plora_state_dict(wrapped).keys()
    )
    load_plora(copy.deepcopy(llama), tmp_path / "wrapped")
    # and the other way round
    changed = {name: value + 1 for name, value in plora_state_dict(model).items()}
    load_plora_state_dict(wrapped, changed)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_A, next(iter(changed.values())))
    assert unadapted_layers(wrapped) == unadapted_layers(model)


@pytest.mark.parametrize("frozen", [True, False])
def test_removing_is_for_the_model_itself(llama, randomised, frozen):
    model = randomised(llama.requires_grad_(not frozen))
    with pytest.raises(ValueError, match="is not the model that PLoRA was applied to"):
        remove_plora(nn.ModuleDict({"llm": model}))
    with pytest.raises(ValueError, match=r"the decoder is 'model', got its part LlamaModel"):
        remove_plora(model.get_decoder())
    again = pickle.loads(pickle.dumps(model))  # a copy is known as well
    assert not {"forward", "generate"} & vars(remove_plora(again)).keys()
    assert all(parameter.requires_grad != frozen for parameter in again.parameters())


def test_a_part_is_not_saved(llama, randomised, tmp_path):
    with pytest.raises(ValueError, match="pass that model"):
        save_plora(randomised(llama).get_decoder(), tmp_path)


def test_a_container_of_two_is_not_saved_as_one(llama, randomised, tmp_path):
    both = nn.ModuleDict({"a": randomised(llama), "b": randomised(llama, r=2)})
    with pytest.raises(ValueError, match=r"whose decoders are \['a.model', 'b.model'\]"):
        save_plora(both, tmp_path)


INNER = {
    "regional compilation": lambda layer: torch.compile(layer, backend="eager"),
    "checkpoint wrapper": checkpoint_wrapper,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrap", sorted(INNER))
def test_what_is_around_a_layer_inside_is_in_no_name(llama, tmp_path, wrap, when):
    config = PLoRAConfig(r=2, target_modules=["q_proj", "down_proj"])
    trainable = {name for name, one in llama.named_parameters() if one.requires_grad}
    save_plora(apply_plora(copy.deepcopy(llama), config), tmp_path / "plain")
    model = apply_plora(copy.deepcopy(llama), config) if when == "after" else copy.deepcopy(llama)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = INNER[wrap](layer)
    if when == "before":
        apply_plora(model, config)
    assert any("_mod" in name for name, _ in model.named_parameters())
    load_plora(model, tmp_path / "plain")
    save_plora(model, tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "wrapped" / path.name).read_bytes(), path.name
    remove_plora(model)
    assert len(trainable) == sum(one.requires_grad for one in model.parameters())


def test_flat_pieces_of_a_sharded_adapter_are_not_saved(llama, randomised, tmp_path):
    model = randomised(llama)
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_A = nn.Parameter(layer.lora_A.detach().flatten()[:3])  # as FSDP1 and ZeRO-3 leave it
    for refused in (plora_state_dict, lambda one: save_plora(one, tmp_path / "saved")):
        with pytest.raises(ValueError, match="summon_full_params"):
            refused(model)
    assert not (tmp_path / "saved").exists()
