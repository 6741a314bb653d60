"""Writes a model as the one file that llama.cpp opens, by the package gguf of its authors.

f32      every weight as it is
f16      matrices in half precision
q8_0     matrices in blocks of 32 bytes and a scale; those with rows that 32 does not divide in half precision
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mambakit.errors import ArtefactError, DataError
from mambakit.lm.formats import gguf as format
from mambakit.training.artefacts import fill_file

if TYPE_CHECKING:
    from mambakit.lm.gguf_vocabulary import Vocabulary
    from mambakit.lm.model import MambaForCausalLM

TYPES = ("f32", "f16", "q8_0")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
_BLOCK = 32  # weights of Q8_0 that share a scale


def write_gguf(
    path: Path, model: "MambaForCausalLM", type: str = "f32", vocabulary: "Vocabulary | None" = None
) -> None:
    """Write `path`, replacing what was there.

    Args:
        type: one of TYPES, of the matrices.
        vocabulary: the tokenizer's; None for a model that is fed token ids.

    Raises:
        DataError: another type.
        ArtefactError: a model that llama.cpp has no equal of, a weight too large for the type, or a file that can't be
            written.
    """
    if type not in TYPES:
        raise DataError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    settings = format.settings(model)
    metadata = {name: value for name, value in settings.items() if name != "general.architecture"}
    metadata |= vocabulary.metadata if vocabulary else {"tokenizer.ggml.model": "no_vocab"}
    metadata |= {
        "general.file_type": int(LlamaFileType[_FILE_TYPES[type]]),
        "general.quantization_version": GGML_QUANT_VERSION,
    }

    def fill(temporary: Path) -> None:
        writer = GGUFWriter(temporary, settings["general.architecture"])
        try:
            for name, value in metadata.items():
                _add(writer, name, value)
            for name, tensor in format.tensors(model):
                kind = _type_of(name, tensor, type)
                stored = _stored(name, tensor, kind)
                writer.add_tensor(name, stored, raw_dtype=_ggml(kind) if kind == "q8_0" else None)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    fill_file(path, fill)


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _type_of(name: str, tensor: Tensor, type: str) -> str:
    if format.stays_float32(name, tensor):
        return "f32"
    return "f16" if type == "q8_0" and tensor.shape[-1] % _BLOCK != 0 else type


def _stored(name: str, tensor: Tensor, type: str) -> np.ndarray:
    values = tensor.contiguous().numpy()
    if type == "f16":
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
    elif type == "q8_0":
        from gguf.quants import quantize

        values = quantize(values, _ggml(type))
    if values.dtype != np.uint8 and not np.isfinite(values).all():
        raise ArtefactError(f"{name} has values that {type} can't hold: choose the type f32, or mend the weights")
    return values


def _ggml(type: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[type.upper()]
