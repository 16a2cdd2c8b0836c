"""How a speech LLM is put together from its parts, saved without them, and loaded again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from .bases import fingerprint, load_encoder, load_language_model, load_tokenizer
from .configuration import BlspKDConfig
from .spelling import spelling_codes

WEIGHTS_NAME = "model.safetensors"
Model = TypeVar("Model", bound="PartsModel")


class PartsModel(PreTrainedModel):
    """A model whose frozen parts stay where they came from.

    Only what is trained is saved; loading fetches the parts anew and checks that they are the
    ones it was trained on.
    """

    config: BlspKDConfig
    config_class = BlspKDConfig
    trainable: frozenset[str] = frozenset()
    spelling: Tensor | None

    @classmethod
    def from_parts(
        cls: type[Model],
        config: BlspKDConfig,
        *,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Model:
        """Load the two pretrained parts that ``config`` names; adapter and PLoRA start fresh.

        The parts' fingerprints are written into ``config``; if it has them already, they must
        agree.

        Args:
            config: names the parts.
            dtype: of the frozen parts. Adapter, PLoRA and a trained encoder are float32.
            trust_remote_code: run code that the language model's checkpoint brings along.
        """
        model = cls._around_parts(config, dtype=dtype, trust_remote_code=trust_remote_code)
        if model.spelling is not None:
            tokenizer = load_tokenizer(config.language_model, trust_remote_code=trust_remote_code)
            # embeddings without a token, which some language models have, are spelled like nothing
            ids = range(min(len(tokenizer), len(model.spelling)))
            tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(ids))]
            model.spelling[: len(tokens)] = spelling_codes(tokens, config.token_spelling)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]  # fewer options: the parts load themselves
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        encoder: str | None = None,
        language_model: str | None = None,
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> Model:
        """Load a trained model: its parts from where they came from, the rest from the folder.

        Args:
            pretrained_model_name_or_path: a folder that :meth:`save_pretrained` wrote.
            encoder: where the encoder is now, if it moved.
            language_model: where the language model is now, if it moved.
            dtype: of the frozen parts.
            trust_remote_code: see :meth:`from_parts`.

        Raises:
            ValueError: if a part is not the one the model was trained on, or the folder's weights
                are not exactly the trained ones.
        """
        folder = Path(pretrained_model_name_or_path)
        weights = folder / WEIGHTS_NAME
        if not weights.is_file():
            raise ValueError(f"{folder} is no trained BLSP-KD model: it has no {WEIGHTS_NAME}")
        config = BlspKDConfig.from_pretrained(str(folder))
        config.encoder = encoder or config.encoder
        config.language_model = language_model or config.language_model
        with safe_open(weights, framework="pt") as archive:
            stored = set(archive.keys())
        model = cls._around_parts(config, dtype=dtype, trust_remote_code=trust_remote_code)
        expected = model.trained_names()
        if stored != expected:
            missing, unknown = sorted(expected - stored), sorted(stored - expected)
            raise ValueError(
                f"{weights} does not fit its config.json: {len(missing)} weights are missing "
                f"({', '.join(missing[:2])}), {len(unknown)} unknown ({', '.join(unknown[:2])})"
            )
        model.load_state_dict(load_file(weights), strict=False)
        model.train(False)
        return model

    def take_weights(self, folder: str | os.PathLike[str]) -> list[str]:
        """Begin with the weights of another trained model: the next stage of a training.

        Args:
            folder: as :meth:`save_pretrained` wrote it. Its adapter must be of the same shape.

        Returns:
            The parts that the folder has no weights for, which stay as they were.

        Raises:
            ValueError: if the folder is no trained model, was trained on other parts, or has
                weights that this model lacks or has in another shape.
        """
        weights = Path(folder) / WEIGHTS_NAME
        if not weights.is_file():
            raise ValueError(f"{folder} is no trained BLSP-KD model: it has no {WEIGHTS_NAME}")
        other = BlspKDConfig.from_pretrained(str(folder))
        for part in ("encoder", "language_model"):
            wanted = getattr(self.config, f"{part}_fingerprint")
            found = getattr(other, f"{part}_fingerprint")
            if wanted != found:
                raise ValueError(
                    f"{folder} was trained on another {part}: its weights are {found}, this run's "
                    f"are {wanted}"
                )
        stored, own = load_file(weights), self.state_dict()
        for name, tensor in stored.items():
            if name not in self.trained_names() or own[name].shape != tensor.shape:
                shape = tuple(own[name].shape) if name in own else "nothing of that name"
                raise ValueError(
                    f"{weights}: {name} is {tuple(tensor.shape)}, this model has {shape}: give "
                    "model.adapter, model.plora and model.train_encoder the values it was trained "
                    "with"
                )
        self.load_state_dict(stored, strict=False)
        missing = self.trained_names() - stored.keys()
        return sorted({"plora" if ".lora_" in name else name.split(".")[0] for name in missing})

    def trained_names(self) -> set[str]:
        """Names of the tensors of a checkpoint: all that are ever trained, and spelling codes."""
        return set(self.trainable) | ({"spelling"} if self.spelling is not None else set())

    def save_pretrained(  # type: ignore[override]  # the rest goes through **kwargs
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config.json and the trained weights alone; the parts stay where they are.

        Args:
            save_directory: the folder, made if need be.
            is_main_process: whether this process is the one that writes.
            state_dict: the weights, if something else gathered them (FSDP, DeepSpeed).
            **kwargs: as :meth:`transformers.PreTrainedModel.save_pretrained`.
        """
        everything = self.state_dict() if state_dict is None else state_dict
        trained = {name: everything[name] for name in sorted(self.trained_names())}
        super().save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=trained, **kwargs
        )

    @classmethod
    def _around_parts(
        cls: type[Model],
        config: BlspKDConfig,
        *,
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> Model:
        encoder = load_encoder(
            config.encoder, dtype=torch.float32 if config.train_encoder else dtype
        )
        language_model = load_language_model(
            config.language_model, dtype=dtype, trust_remote_code=trust_remote_code
        )
        for part, module, name in (
            ("encoder", encoder, config.encoder),
            ("language_model", language_model, config.language_model),
        ):
            found = fingerprint(module)
            expected = getattr(config, f"{part}_fingerprint")
            if expected is not None and expected != found:
                raise ValueError(
                    f"this checkpoint was trained on another {part}: expected weights {expected}, "
                    f"{name!r} has {found}; give the path of the right one"
                )
            setattr(config, f"{part}_fingerprint", found)
        return cls(config, encoder, language_model)
