"""Folders of weights in the public formats: found, told apart, read, checked tensor by tensor, and written.

    config.json   model.safetensors | model.safetensors.index.json + shards | pytorch_model.bin (+ index)

No pickle runs code: `.bin` files are read with weights_only=True.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mambakit.errors import ArtefactError, DataError
from mambakit.lm.config import MambaConfig
from mambakit.lm.formats import hugging_face, state_spaces
from mambakit.nn.precision import KeepsFloat32
from mambakit.training.artefacts import read_json, write_file

if TYPE_CHECKING:
    from mambakit.lm.pretrained import MambaPreTrainedModel

FORMATS = ("hf", "state-spaces", "state-spaces-bin")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
_OLDER_FILES = ["*.json", "pytorch_model*.bin", "*.txt", "*.model"]  # downloaded only where there are no safetensors
_SHOWN = 3  # tensors that an error names


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: a folder, or a repository on the hub."""

    name: str
    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    def folder(self) -> Path:
        """The folder, downloaded if need be; raises ArtefactError where there is none."""
        path = Path(self.name)
        if path.is_dir():
            return path
        if path.exists() or self.name.startswith(("/", ".", "~")) or self.name.count("/") > 1:
            raise ArtefactError(f"{self.name} is not a folder with a model: expected config.json and the weights in it")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        def download(patterns: list[str]) -> Path:
            return Path(
                snapshot_download(
                    self.name,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=self.local_files_only,
                    allow_patterns=patterns,
                )
            )

        try:
            found = download(_FILES)
            return found if any(found.glob("*.safetensors")) else download(_OLDER_FILES)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtefactError(
                f"{self.name} is neither a folder here nor a repository that the hub gave ({reason})"
            ) from error


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, under our names."""

    folder: Path
    format: str  # "hf" or "state-spaces"
    settings: dict[str, Any]  # arguments of MambaConfig
    tensors: dict[str, Tensor]
    generation: dict[str, Any] | None


def open_checkpoint(source: Source) -> Checkpoint:
    """Read a checkpoint, whichever of the formats it is in; raises ArtefactError where it is none."""
    folder = source.folder()
    raw = _decoded(read_json(folder / "config.json"))
    if hugging_face.recognises(raw):
        name, settings, tensors = "hf", hugging_face.read(raw), _read_tensors(folder)
    elif state_spaces.recognises(raw):
        name, settings, tensors = "state-spaces", state_spaces.read(raw), _read_tensors(folder)
    else:
        kind = f"model_type {raw['model_type']!r}" if "model_type" in raw else "neither model_type nor d_model"
        raise ArtefactError(
            f"{folder / 'config.json'} has {kind}: expected mamba, mamba2 or falcon_mamba of transformers, "
            "or a model of mamba-ssm"
        )
    # Old checkpoints of transformers have the other's name for the embedding.
    tensors = {state_spaces.our_name(key): tensor for key, tensor in tensors.items()}
    generation = folder / "generation_config.json"
    return Checkpoint(folder, name, settings, tensors, read_json(generation) if generation.is_file() else None)


def load_into(model: "MambaPreTrainedModel", checkpoint: Checkpoint, dtype: torch.dtype | None) -> None:
    """Give a model, made on the device "meta", the checkpoint's weights in this dtype, or in their own.

    Raises ArtefactError, naming tensors, where they are not the model's.
    """
    expected = model.state_dict()
    base = "lm_head.weight" not in expected
    tensors = dict(checkpoint.tensors)
    if base:
        tensors.pop("lm_head.weight", None)
        tensors = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    elif model.config.tie_word_embeddings and "backbone.embeddings.weight" in tensors:
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
    _check(checkpoint.folder, expected, tensors)
    dtype = dtype or tensors[f"{'' if base else 'backbone.'}embeddings.weight"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    kept = set(_kept_in_float32(model))
    model.load_state_dict(
        {name: tensor.to(wide if name in kept else dtype) for name, tensor in tensors.items()}, assign=True
    )


def write_checkpoint(
    folder: Path, model: "MambaPreTrainedModel", format: str | None, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Write a model's folder in one of FORMATS; None chooses by the model."""
    config: MambaConfig = model.config
    if format is None:
        format = default_format(config)
    if format not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    if not any(name.startswith("backbone.") for name in tensors):
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if config.tie_word_embeddings or format != "state-spaces-bin":
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if format == "hf":
        if config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        text = _stock_config(hugging_face.write(config))
        _write_safetensors(folder / "model.safetensors", tensors)
        write_file(folder / "config.json", text.encode())
    else:
        settings = state_spaces.write(config)
        if config.tie_word_embeddings:  # mamba-ssm loads strictly, so that both names have to be there
            tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
        tensors = {state_spaces.their_name(name): tensor for name, tensor in tensors.items()}
        _remove_other_weights(folder, format)
        if format == "state-spaces":
            _write_safetensors(folder / "model.safetensors", tensors)
        else:
            _write_bin(folder / "pytorch_model.bin", tensors)
        write_file(folder / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        write_file(folder / "generation_config.json", generation.to_json_string().encode())


def default_format(config: MambaConfig) -> str:
    """hf for what transformers has a class for, state-spaces-bin for the rest.

    Raises ArtefactError for a model that neither can hold.
    """
    try:
        hugging_face.write(config)
    except ArtefactError:
        state_spaces.write(config)
        return "state-spaces-bin"
    return "hf"


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from whichever files hold them."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            files = sorted(set(read_json(folder / index)["weight_map"].values()))
            return {name: tensor for file in files for name, tensor in _read_file(folder / Path(file).name).items()}
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
    raise ArtefactError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, SafetensorError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
        lost = _first_lost_tensor(path)
        what = f"{lost} is missing, since the file ends before it" if lost else " ".join(str(error).split())[:200]
        raise ArtefactError(f"cannot read {path}: it is truncated or damaged ({what})") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ArtefactError(f"cannot read {path}: expected tensors by name")
    return found


def _first_lost_tensor(path: Path) -> str | None:
    """The first tensor that a truncated safetensors file promises and does not hold."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        except (struct.error, ValueError):
            return None
    header.pop("__metadata__", None)
    ends = sorted((entry["data_offsets"][1], name) for name, entry in header.items())
    return next((name for end, name in ends if 8 + length + end > size), None)


def _check(folder: Path, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(wanted.shape)}"
        for name, wanted in expected.items()
        if name in tensors and tensors[name].shape != wanted.shape
    ]
    problems += [f"{name} is not a tensor of this model" for name in tensors if name not in expected]
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ArtefactError(
            f"the weights in {folder} do not fit its config.json: {'; '.join(problems[:_SHOWN])}{more}; "
            "download or convert the model again"
        )


def _kept_in_float32(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        if isinstance(module, KeepsFloat32):
            yield from (f"{prefix}.{name}" for name in module.in_float32)


def _write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    write_file(path, save(tensors, metadata={"format": "pt"}))


def _write_bin(path: Path, tensors: dict[str, Tensor]) -> None:
    import io

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_file(path, buffer.getvalue())


def _remove_other_weights(folder: Path, format: str) -> None:
    """An older file of weights would be read in place of the one that is written now."""
    other = "pytorch_model.bin" if format == "state-spaces" else "model.safetensors"
    (folder / other).unlink(missing_ok=True)


def _stock_config(settings: dict[str, Any]) -> str:
    """A config.json as the installed transformers writes it."""
    from transformers import AutoConfig

    kind = settings["model_type"]
    own = {name: value for name, value in settings.items() if name != "model_type"}
    return AutoConfig.for_model(kind, **own).to_json_string()


def _decoded(value: Any) -> Any:
    """A config.json with the numbers that JSON has no word for, as transformers writes them."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
