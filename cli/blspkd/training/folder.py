"""A run's folder: what may be in it at the start, and what is left in it at the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from .config import TrainConfig
from .config_file import as_dict, from_dict

CONFIG_NAME = "train.yaml"
LOG_NAME = "log.jsonl"
BEFORE_NAME = "before.json"
SUMMARY_NAME = "summary.json"
DATA_NAME = "data"
"""Where the clips that come inside this package are unpacked."""
MAY_CHANGE = (
    "name",
    "output",
    "log_steps",
    "eval_steps",
    "save_steps",
    "keep_checkpoints",
    "num_workers",
    "tensorboard",
    "data.cache_dir",
    "model.trust_remote_code",
    "optim.gradient_checkpointing",
    "optim.share_prompt",
)
"""Settings that a resumed run may have otherwise: no figure of it depends on them."""


def open_folder(config: TrainConfig, *, resume: bool, force: bool) -> Path:
    """The run's folder, made if need be.

    Without ``output`` in the configuration it is ``runs/NAME``, with a number behind it if that is
    taken.

    Raises:
        ValueError: if the folder asked for holds something and neither ``resume`` nor ``force``
            was given, if there is nothing to resume, if ``force`` was given for a folder that
            holds something else than a run, or if the run would begin with weights that are in
            there.
    """
    if config.output is None:
        folder = Path("runs") / config.name
        number = 1
        while not resume and not force and _is_occupied(folder):
            number += 1
            folder = Path("runs") / f"{config.name}-{number}"
    else:
        folder = Path(config.output).expanduser()
    if resume and last_checkpoint(folder) is None:
        raise ValueError(f"nothing to resume in {folder}: it has no checkpoint")
    start = config.model.start_from
    if start is not None and not resume:
        weights = Path(start).expanduser().resolve()
        if folder.resolve() in (weights, *weights.parents):
            raise ValueError(
                f"{folder} holds the weights that the run is to begin with (model.start_from): "
                "choose another folder with output=FOLDER"
            )
    if _is_occupied(folder) and not (resume or force):
        raise ValueError(
            f"{folder} is not empty: go on with --resume, start over with --force, or choose "
            "another folder with output=FOLDER"
        )
    if force and not resume and _is_occupied(folder) and not (folder / CONFIG_NAME).exists():
        raise ValueError(f"{folder} is no run's folder (it has no train.yaml): not emptying it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clear_folder(folder: Path) -> None:
    """Empty a run's folder that is to be started over in, but for the clips just unpacked."""
    for path in folder.iterdir():
        if path.name == DATA_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_same_run(folder: Path, config: TrainConfig, *, overfit: int) -> None:
    """Refuse to go on with a run with other settings than it began with.

    Most would not take effect, because the checkpoint has its own, and the others would make the
    run two halves of different ones. A folder without train.yaml is not looked at.

    Args:
        folder: the run's.
        config: what it is to go on with; how often it logs and saves, how it computes and its
            number of steps may be other.
        overfit: as for the run.

    Raises:
        ValueError: naming each setting that differs, with both values.
    """
    if not (folder / CONFIG_NAME).exists():
        return
    document = read_document(folder)
    before = _flat(as_dict(from_dict(document["config"])))
    before["--overfit"] = document.get("overfit", 0)
    now = {**_flat(as_dict(config)), "--overfit": overfit}
    free = set(MAY_CHANGE)
    if None not in (config.optim.max_steps, before["optim.max_steps"]):
        free.add("optim.max_steps")  # not instead of epochs, or the other way round
    changed = [
        f"{name} was {before.get(name)!r}, got {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if name not in free and before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"--resume: expected the settings that the run in {folder} began with: "
            f"{'; '.join(changed)}. Give them as they were, or begin another run with "
            "output=FOLDER"
        )


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A nested mapping by dotted names; tuples as the lists that YAML makes of them.

    What is empty is None, as a field that was not given.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{above}{name}."))
        else:
            empty = isinstance(value, (dict, list, tuple)) and not value
            whole = list(value) if isinstance(value, tuple) else value
            flat[f"{above}{name}"] = None if empty else whole
    return flat


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    steps = {path: path.name.removeprefix("checkpoint-") for path in found}
    # others, such as checkpoint-5-old, are somebody's own
    numbered = [path for path in found if steps[path].isdecimal()]
    return max(numbered, key=lambda path: int(steps[path]), default=None)


def write_config(folder: Path, config: TrainConfig, *, overfit: int = 0) -> None:
    """Write the resolved configuration, the code's commit, versions and number of processes."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("blspkd", "torch", "transformers", "accelerate")
    }
    document = {
        "config": as_dict(config),
        "overfit": overfit,
        "commit": _commit(),
        "versions": versions,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # torchrun's
    }
    write_atomically(folder / CONFIG_NAME, yaml.safe_dump(document, sort_keys=False))


def read_document(folder: Path) -> dict[str, Any]:
    """What :func:`write_config` left: ``config``, ``commit``, ``versions`` and ``processes``."""
    document: dict[str, Any] = yaml.safe_load((folder / CONFIG_NAME).read_text("utf-8"))
    return document


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _is_occupied(folder: Path) -> bool:
    """Whether it holds anything but unpacked clips, which a start that failed leaves behind."""
    return folder.exists() and any(path.name != DATA_NAME for path in folder.iterdir())


def _commit() -> str | None:
    """The commit this code was run from; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
