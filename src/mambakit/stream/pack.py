"""A trained ensemble as a submission: solution.py, a step in NumPy, and weights; the same bytes every time.

    solution.py        PredictionModel
    stepper/           src/mambakit/stream/plain, as it is
    weights.json       kind, sizes, and where each array lies in
    weights.bin        float32, little endian

Nothing in it needs installing beyond NumPy.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mambakit.errors import ArtefactError
from mambakit.nn import Backbone, Mamba, Mamba2, Mamba3
from mambakit.nn.s4d import S4D
from mambakit.stream.ensemble import Ensemble
from mambakit.training.artefacts import write_file

LARGEST_ZIP = 20 * 2**20  # bytes, the contest's limit
_WRITTEN = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold, the same for every file
_SOLUTION = '''"""The solution: an ensemble of recurrent networks, stepped in NumPy. Packed by mambakit."""

from pathlib import Path

from stepper.submission import SubmittedModel


class PredictionModel(SubmittedModel):
    """What the contest calls."""

    def __init__(self):
        super().__init__(Path(__file__).resolve().parent)
'''


def pack(ensemble: Ensemble, path: str | Path) -> int:
    """Write the submission of an ensemble to `path`, and return its size in bytes.

    Raises ArtefactError where it would be larger than the contest allows, or can't be written.
    """
    content = submission(ensemble)
    if len(content) > LARGEST_ZIP:
        raise ArtefactError(
            f"the submission would be {len(content) / 2**20:.1f} MB, and the contest takes "
            f"{LARGEST_ZIP / 2**20:.0f} MB: train fewer models (--num-models) or smaller ones (--d-model, --n-layers)"
        )
    write_file(path, content)
    return len(content)


def submission(ensemble: Ensemble) -> bytes:
    """The bytes of the zip: the same for the same weights."""
    settings, arrays = plain_form(ensemble)
    places: dict[str, tuple[int, list[int]]] = {}
    parts, at = [], 0
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name], dtype="<f4")
        places[name] = (at, list(array.shape))
        parts.append(array.tobytes())
        at += array.size
    files = {
        "solution.py": _SOLUTION.encode(),
        "weights.json": (json.dumps({**settings, "arrays": places}, sort_keys=True) + "\n").encode(),
        "weights.bin": b"".join(parts),
    }
    plain = resources.files("mambakit.stream") / "plain"
    files |= {f"stepper/{file.name}": file.read_bytes() for file in plain.iterdir() if file.name.endswith(".py")}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file_name in sorted(files):
            entry = zipfile.ZipInfo(file_name, _WRITTEN)
            entry.create_system = 3  # as on Unix, wherever it is packed
            entry.external_attr = 0o644 << 16
            # Stored: weights hardly shrink, and what deflate makes depends on the zlib at hand.
            archive.writestr(entry, files[file_name], zipfile.ZIP_STORED)
    return buffer.getvalue()


def plain_form(ensemble: Ensemble) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings, and float32 arrays with an axis of networks in front, as `plain/submission.py` reads them."""
    config, models = ensemble.config, ensemble.models
    each = [_network_arrays(model.embed, model.stack, model.head) for model in models]
    arrays = {name: np.stack([network[name] for network in each]) for name in each[0]}
    if config.residual:
        arrays |= {"ridge": ensemble.ridge.weight, "ridge_bias": ensemble.ridge.bias}
    stack = models[0].stack
    settings = {
        "kind": config.kind,
        "layers": len(stack.layers) if isinstance(stack, Backbone) else stack.num_layers,
        "eps": stack.norm_f.eps if isinstance(stack, Backbone) else 0.0,
        "inputs": models[0].inputs,
        "engineered": config.features == "engineered",
        "normalise": config.normalise,
        "residual": config.residual,
        "lags": ensemble.ridge.lags,
    }
    return settings, arrays


def _network_arrays(embed: nn.Linear, stack: nn.Module, head: nn.Linear) -> dict[str, np.ndarray]:
    named: dict[str, Tensor] = {
        "embed": embed.weight,
        "embed_bias": embed.bias,
        "head": head.weight,
        "head_bias": head.bias,
    }
    if isinstance(stack, Backbone):
        named["norm"] = stack.norm_f.weight
        for position, block in enumerate(stack.layers):
            layer = {"before": block.norm.weight, **_mixer_arrays(block.mixer)}  # type: ignore[union-attr, arg-type]
            named |= {f"layers.{position}.{name}": tensor for name, tensor in layer.items()}  # type: ignore[misc]
    else:
        for name, tensor in stack.named_parameters():  # such as weight_ih_l0
            plain, _, number = name.rpartition("_l")
            named[f"layers.{number}.{plain}"] = tensor
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in named.items()}


@torch.no_grad()
def _mixer_arrays(mixer: nn.Module) -> dict[str, Tensor]:
    """The weights of a mixer as its class in plain/mixers.py reads them; what never changes is computed here."""
    if isinstance(mixer, Mamba):
        return {
            **_named(mixer, ("in_proj", "x_proj", "dt_proj", "out_proj")),
            **_convolution(mixer.conv1d),
            "dt_bias": mixer.dt_proj.bias,
            "A": -mixer.A_log.exp(),
            "D": mixer.D,
        }
    if isinstance(mixer, Mamba2):
        assert mixer.norm is not None
        return {
            **_named(mixer, ("in_proj", "out_proj", "norm")),
            **_convolution(mixer.conv1d),
            "dt_bias": mixer.dt_bias,
            "A": -mixer.A_log.exp(),
            "D": mixer.D,
        }
    if isinstance(mixer, Mamba3):
        own = {name: getattr(mixer, name) for name in ("dt_bias", "D")}
        biases = {name: getattr(mixer, name)[:, 0] for name in ("B_bias", "C_bias")}  # of the only rank
        floor = torch.tensor([mixer.A_floor])
        return {**_named(mixer, ("in_proj", "out_proj", "B_norm", "C_norm")), **own, **biases, "A_floor": floor}
    assert isinstance(mixer, S4D)
    log_Ab, Bb = mixer.discretised()
    modes = {"Ab": torch.view_as_real(torch.exp(log_Ab)), "Bb": torch.view_as_real(Bb), "C": mixer.C}
    return {**_named(mixer, ("out_proj",)), **modes, "D": mixer.D, "out_bias": mixer.out_proj.bias}


def _named(mixer: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: getattr(mixer, name).weight for name in names}


def _convolution(convolution: nn.Conv1d) -> dict[str, Tensor]:
    assert convolution.bias is not None
    return {"conv_weight": convolution.weight.squeeze(1).T, "conv_bias": convolution.bias}
