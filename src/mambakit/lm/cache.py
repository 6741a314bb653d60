"""What a language model has read so far: the states of its layers, to carry on from, store, restore and fork.

    output = model(prompt)                        reads a prompt
    cache = output.cache
    model(more, cache=cache.fork())     one way to go on
    model(other, cache=cache.fork())    another

Calls that carry a cache on replace its states and never change them in place, so a fork costs nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map, tree_unflatten
from torch.utils._pytree import tree_structure as structure_of
from transformers import Cache

from mambakit.errors import ArtefactError
from mambakit.training.artefacts import write_file

if TYPE_CHECKING:
    from mambakit.lm.model import MambaForCausalLM, MambaModel


class StateCache(Cache):
    """The states of all layers after the tokens read so far.

    Attributes:
        state: what `mambakit.nn.Backbone` returns as its state; None before the first token.
        length: tokens read in each row, padding included.
    """

    def __init__(self, state: tuple[Any, ...] | None = None, length: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.length = state, length

    def advance(self, state: tuple[Any, ...], tokens: int) -> None:
        """Take over the state after `tokens` more."""
        self.state, self.length = state, self.length + tokens

    def fork(self) -> "StateCache":
        """Another cache that carries on from the same state on its own."""
        return StateCache(self.state, self.length)

    def save(self, path: str | Path) -> None:
        """Store it as a safetensors file; raises ArtefactError where that can't be written."""
        named = {_name(path): part.detach().cpu().contiguous() for path, part in tree_leaves_with_path(self.state)}
        write_file(path, save(named, metadata={"length": str(self.length)}))

    @classmethod
    def load(cls, path: str | Path, model: "MambaModel | MambaForCausalLM") -> "StateCache":
        """Read what `save` stored, for the model that it is of.

        Raises ArtefactError where the file is missing, damaged, or of another model.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                length = int((file.metadata() or {})["length"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArtefactError(f"{path} is not a stored state ({' '.join(str(error).split())})") from error
        template = model.get_base().initial_state()
        expected = {_name(place): part for place, part in tree_leaves_with_path(template)}
        for name in [*expected, *tensors]:
            wanted, got = expected.get(name), tensors.get(name)
            # An axis that is empty in the state of an empty sequence grows with the past, as an attention's does.
            if wanted is None or got is None or _sizes(got, wanted) != tuple(wanted.shape[1:]):
                raise ArtefactError(f"{path} is the state of another model: {name} does not fit")
        parts = [tensors[name].to(part.device) for name, part in expected.items()]
        return cls(tree_unflatten(parts, structure_of(template)), length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, padding included; the same for every layer."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No maximum."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i carry on from what was row beam_idx[i]."""
        self._each(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._each(lambda part: part[indices.to(part.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Start afresh, as before the first token."""
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state can't be taken back."""
        raise NotImplementedError("a recurrent state can't be taken back: fork the cache before what may be undone")

    @property
    def is_initialized(self) -> bool:
        """Whether anything was read."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works."""
        return False

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map(change, self.state)


def _name(path: Any) -> str:
    """The place of a tensor in the state, such as `0.conv`."""
    return keystr(path).replace("]", "").replace("[", ".").strip(".").replace("..", ".")


def _sizes(got: Tensor, wanted: Tensor) -> tuple[int, ...]:
    if got.dim() != wanted.dim():
        return ()
    return tuple(size if first else 0 for size, first in zip(got.shape[1:], wanted.shape[1:], strict=True))


def check_batch(state: tuple[Any, ...], batch: int) -> None:
    """Raise ValueError unless the state is of `batch` rows."""
    rows = {part.shape[0] for part in tree_leaves_of(state)}
    if rows != {batch}:
        raise ValueError(f"cache holds {max(rows)} rows, but the batch has {batch}")


def tree_leaves_of(state: tuple[Any, ...]) -> list[Tensor]:
    """Every tensor of a state."""
    return [part for _, part in tree_leaves_with_path(state) if isinstance(part, torch.Tensor)]
