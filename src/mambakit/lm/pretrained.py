"""Reading and writing models in the public formats: what the model with a head and the one without share."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from mambakit.errors import DataError
from mambakit.lm.checkpoint import Source, load_into, open_checkpoint, write_checkpoint
from mambakit.lm.config import MambaConfig
from mambakit.lm.quantisation import quantise


class MambaPreTrainedModel(PreTrainedModel):
    """What both models share: initial weights, and reading and writing of the public formats."""

    config: MambaConfig
    config_class = MambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - transformers reads a plain list

    def _init_weights(self, module: nn.Module) -> None:
        # The core's layers draw their own.
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: MambaConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        weights: str | None = None,
        **changes: Any,
    ) -> Any:
        """Read a model from a folder or, online, from the hub, in either public format.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a repository on the hub.
            config: settings to take in place of those of the checkpoint.
            dtype: of the weights, or its name; None or "auto" keeps the checkpoint's. Rates and steps stay in float32.
            device_map: a device to put the model on.
            revision, cache_dir, token, local_files_only: of the hub.
            weights: "bfloat16", "int8" or "int4" to store them so, for inference: see `mambakit.lm.quantise`.
            changes: settings of MambaConfig to change; `mixer_options` is merged.

        Raises:
            ArtefactError: a file is missing or damaged, a tensor is missing or misshapen; the message names it.
            DataError: a setting that does not exist.
        """
        if weights is not None and _as_dtype(dtype) is not None:
            raise DataError(f"give dtype or weights, one of them: weights={weights!r} computes in float32")
        source = Source(str(pretrained_model_name_or_path), revision, cache_dir, token, local_files_only)
        checkpoint = open_checkpoint(source)
        settings = checkpoint.settings
        if config is None:
            if options := changes.pop("mixer_options", None):
                settings["mixer_options"] = {**settings["mixer_options"], **options}
            config = MambaConfig(**{**settings, **changes})
        elif changes:
            raise DataError(f"{sorted(changes)[0]} can't be given beside config: set it there")
        with torch.device("meta"):
            model: Any = cls(config)
        load_into(model, checkpoint, _as_dtype(dtype))
        model.tie_weights()
        if isinstance(model, GenerationMixin) and checkpoint.generation is not None:
            model.generation_config = GenerationConfig.from_dict(checkpoint.generation)
        model.config._name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        model.preferred_format = checkpoint.format
        if weights is not None:
            checkpoint.tensors.clear()  # so that each is freed once it is quantised
            quantise(model, weights)
        return model.to(device_map or "cpu").eval()

    preferred_format: str | None = None  # the one that it was read in
    quantised: str | None = None  # what its weights are stored in, if not as parameters

    def train(self, mode: bool = True) -> Any:
        """As of torch; raises DataError for a quantised model, which can't be trained."""
        if mode and self.quantised is not None:
            raise DataError(f"weights in {self.quantised} can't be trained: read the model without quantising it")
        return super().train(mode)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        format: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        safe_serialization: bool = True,
    ) -> None:
        """Write the folder `save_directory` as transformers or mamba-ssm read it.

        Args:
            format: "hf", "state-spaces" (safetensors) or "state-spaces-bin" (the `pytorch_model.bin` that mamba-ssm's
                own loader opens); None is the format that the model was read in, or else hf for the models that
                transformers has a class for, and state-spaces-bin for others.
            state_dict: the weights, if not the model's own.
            is_main_process: whether this process is the one that writes.
            safe_serialization: only True: the format decides how weights are stored.

        Raises ArtefactError for a model that the format can't hold, or a folder that can't be written.
        """
        if not safe_serialization:
            raise DataError("safe_serialization=False is not supported: give format='state-spaces-bin' for a .bin file")
        if self.quantised is not None:
            raise DataError(
                f"no public format holds weights in {self.quantised}: save the model that was quantised, "
                "and quantise it when it is read"
            )
        if is_main_process:
            self.config.dtype = self.dtype
            write_checkpoint(Path(save_directory), self, format or self.preferred_format, state_dict)


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise DataError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    return found
