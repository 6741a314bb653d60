"""`InferenceParams` of mamba_ssm: where its layers keep their states between calls, by the number of the layer."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mambakit.errors import DataError


@dataclass
class InferenceParams:
    """The states of a model while it decodes; `seqlen_offset`, tokens seen, is counted on by the caller."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begin anew; states stay allocated, and the first call of a layer overwrites them."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


def states_of_layer(layer: Any, inference_params: InferenceParams, batch: int) -> tuple[Tensor, ...]:
    """The states of `layer`, which are updated in place; zeros when it is called for the first time."""
    if layer.layer_idx is None:
        raise DataError("inference_params needs the number of the layer: make it with layer_idx=")
    memory = inference_params.key_value_memory_dict
    if layer.layer_idx not in memory:
        memory[layer.layer_idx] = layer.allocate_inference_cache(batch, inference_params.max_seqlen)
    states: tuple[Tensor, ...] = memory[layer.layer_idx]
    if states[0].shape[0] != batch:
        raise DataError(f"the states in inference_params are of a batch of {states[0].shape[0]}, got one of {batch}")
    return states
