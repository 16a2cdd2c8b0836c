"""One of the processes that test_plora_distributed starts: python two_processes.py RANK FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from plora import PLoRAConfig, apply_plora, plora_mask, plora_state_dict, save_plora

PROCESSES = 2
# which rows of the batch have masked positions: all, or none of the second process's
CASES = {"all": 4, "one empty": 2}


def build() -> nn.Module:
    """The same adapted model in every process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = apply_plora(LlamaForCausalLM(config), PLoRAConfig(r=2, lora_dropout=0.0)).double()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(4, 6) token ids and masks, of which the first `rows` are not empty."""
    ids = torch.arange(24).view(4, 6) % 31
    mask = torch.zeros(4, 6, dtype=torch.bool)
    for row in range(rows):
        mask[row, row : row + 2] = True
    return ids, mask


def train(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
    """Two steps, one with the mask as an argument, one with it around the call."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        if step:
            with plora_mask(mask):
                logits = model(input_ids=ids, use_cache=False).logits
        else:
            logits = model(input_ids=ids, use_cache=False, plora_mask=mask).logits
        logits.log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()


def shard(model: nn.Module, *, checkpointing: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=PROCESSES
    )
    found = {}
    for case, rows in CASES.items():
        ids, mask = (part.chunk(PROCESSES)[rank] for part in batch(rows))
        model = build()
        train(DistributedDataParallel(model), ids, mask)
        found[f"ddp, {case}"] = plora_state_dict(model)
        for checkpointing in (False, True):
            model = shard(build(), checkpointing=checkpointing)
            train(model, ids, mask)
            whole = {name: value.full_tensor() for name, value in plora_state_dict(model).items()}
            found[f"fsdp, {case}, checkpointing {checkpointing}"] = whole
    save_plora(model, folder / "adapter")
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
