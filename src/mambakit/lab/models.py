"""Models for the lab's tasks: embedding, blocks of one mixer, norm, head; logits of the last token.

| name              | class                      | what it is                                            |
|-------------------|----------------------------|-------------------------------------------------------|
| standard          | MambaForComposite          | Mamba as it is                                        |
| ones              | MambaOnesConv              | every convolution kernel fixed at 1                   |
| learned           | MambaPosEncoding           | learned positions added to the embedding              |
| sinusoidal        | MambaPosEncoding           | sinusoidal ones                                       |
| residual          | MambaWithResidual          | (x, B, C) = silu(conv(U)) + U, with learned positions |
| gated             | MambaWithResidual          | (x, B, C) = silu(conv(U)) * U, likewise               |
| transformer       | TransformerForComposite    | attention and a gated MLP                             |
| transformer-conv  | TransformerForComposite    | its queries, keys and values convolved first          |
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mambakit.errors import DataError
from mambakit.lab.initialisation import Reading, initialise
from mambakit.lab.mixers import Path, mixer_class, set_kernels_to_one
from mambakit.nn import Attention, Backbone

POSITIONS = (None, "learned", "sinusoidal")
_EMBEDDING_DEVIATION = 0.02  # where gamma says nothing: mamba-ssm's


class MambaForComposite(nn.Module):
    """A stack of Mamba that answers at the last token: `logits = model(tokens)`.

    Args:
        n_layers: blocks.
        gamma: of `lab.initialisation.initialise`; None leaves the mixers' own initialisation.
        vocab_size: tokens, and classes of the answer.
        d_model, d_state, expand: of the mixer.
        d_conv: taps of the convolution; of Mamba-3, which has none of its own, 0 is its own self and more puts one
            before its scan. None is 4, and 0 for Mamba-3.
        mixer: "mamba", "mamba2" or "mamba3".
        headdim: channels of a head of Mamba-2 and -3; None for one head, as in the paper.
        reading: of the initialisation.
        tie_embeddings: one matrix for embedding and head.
        mixer_options: further arguments of the mixer.
        device, dtype: of the parameters.

    >>> model = MambaForComposite(n_layers=2, gamma=1.0)
    >>> model(torch.randint(0, 201, (4, 8))).shape
    torch.Size([4, 201])
    """

    _path: Path = "plain"
    _needs_convolution = False

    def __init__(
        self,
        n_layers: int = 2,
        gamma: float | None = 1.0,
        vocab_size: int = 201,
        d_model: int = 32,
        d_state: int = 128,
        d_conv: int | None = None,
        expand: int = 2,
        *,
        mixer: str = "mamba2",
        headdim: int | None = None,
        reading: Reading = "paper",
        tie_embeddings: bool = False,
        mixer_options: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_conv is None:
            d_conv = 0 if mixer == "mamba3" and not self._needs_convolution else 4
        self._config: dict[str, Any] = {
            "n_layers": n_layers,
            "gamma": gamma,
            "vocab_size": vocab_size,
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "mixer": mixer,
            "headdim": headdim,
            "reading": reading,
            "tie_embeddings": tie_embeddings,
            "mixer_options": dict(mixer_options or {}),
        }
        mixer_of = self._mixer(mixer, d_conv)
        options = self._options(mixer, d_model, d_state, d_conv, expand, headdim)
        self._build(mixer_of, {**options, **(mixer_options or {})}, {"device": device, "dtype": dtype})

    def forward(self, tokens: Tensor, answers: int | None = None) -> Tensor:
        """Logits of the last token, (batch, vocab_size), of tokens (batch, length).

        With `answers`, those of the last `answers` tokens: (batch, answers, vocab_size).
        """
        hidden, _ = self.read(tokens)
        return self.head(hidden[:, -1] if answers is None else hidden[:, -answers:])

    def read(self, tokens: Tensor, state: tuple[Any, ...] | None = None, start: int = 0) -> tuple[Tensor, Any]:
        """Hidden vectors (batch, length, d_model) of tokens (batch, length), and the state after them.

        Args:
            state: what an earlier call returned, to carry on from there.
            start: the position of the first token, where positions are encoded.
        """
        hidden, state = self.backbone(self.embed(tokens, start), state)
        return hidden, state

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """What the first block reads, (batch, length, d_model)."""
        return self.embedding(tokens)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make a model of the same shape: `type(model)(**model.get_config())`."""
        return dict(self._config)

    def _mixer(self, mixer: str, d_conv: int) -> Callable[..., nn.Module]:
        if d_conv == 0 and (mixer != "mamba3" or self._needs_convolution):
            raise DataError(f"d_conv must be at least 1 for {type(self).__name__} of {mixer}, got 0")
        return mixer_class(mixer, self._path, convolution=d_conv > 0)

    def _options(
        self, mixer: str, d_model: int, d_state: int, d_conv: int, expand: int, headdim: int | None
    ) -> dict[str, Any]:
        options: dict[str, Any] = {"d_state": d_state, "expand": expand}
        if d_conv:
            options["d_conv"] = d_conv
        if mixer != "mamba":
            options["headdim"] = headdim or expand * d_model
        elif headdim is not None:
            raise DataError(f"headdim is of Mamba-2 and Mamba-3; a mamba has no heads, got {headdim}")
        return options

    def _build(
        self, mixer: Callable[..., nn.Module], options: dict[str, Any], made: dict[str, Any], **blocks: Any
    ) -> None:
        config = self._config
        vocab_size, d_model, gamma = config["vocab_size"], config["d_model"], config["gamma"]
        self.embedding = nn.Embedding(vocab_size, d_model, **made)
        nn.init.normal_(self.embedding.weight, std=_EMBEDDING_DEVIATION)
        self.backbone = Backbone(d_model, config["n_layers"], mixer, options, **blocks, **made)
        self.head = nn.Linear(d_model, vocab_size, bias=False, **made)
        if config["tie_embeddings"]:
            self.head.weight = self.embedding.weight
        if gamma is not None:
            initialise(self, gamma, config["reading"])


class MambaOnesConv(MambaForComposite):
    """`MambaForComposite` whose convolution kernels are fixed at 1: the order of neighbours is lost in them."""

    _needs_convolution = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        set_kernels_to_one(self)


class MambaPosEncoding(MambaForComposite):
    """`MambaForComposite` that adds positions to its embedding.

    Args:
        max_seq_len: the longest sequence of learned positions.
        encoding: "learned" (initialised as the other weights are) or "sinusoidal" (arXiv 1706.03762).
        options: of `MambaForComposite`.
    """

    def __init__(self, *args: Any, max_seq_len: int = 64, encoding: str = "learned", **options: Any) -> None:
        if encoding not in POSITIONS[1:]:
            raise DataError(f"encoding must be learned or sinusoidal, got {encoding!r}")
        if max_seq_len < 1:
            raise DataError(f"max_seq_len must be at least 1, got {max_seq_len}")
        self.max_seq_len, self.encoding = max_seq_len, encoding
        super().__init__(*args, **options)

    def get_config(self) -> dict[str, Any]:
        return {"max_seq_len": self.max_seq_len, "encoding": self.encoding, **super().get_config()}

    def _build(
        self, mixer: Callable[..., nn.Module], options: dict[str, Any], made: dict[str, Any], **blocks: Any
    ) -> None:
        self.position = None
        if self.encoding == "learned":
            self.position = nn.Embedding(self.max_seq_len, self._config["d_model"], **made)
            nn.init.normal_(self.position.weight, std=_EMBEDDING_DEVIATION)
        super()._build(mixer, options, made, **blocks)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        hidden = self.embedding(tokens)
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        if self.position is None:
            return hidden + sinusoids(places, hidden.shape[-1]).to(hidden.dtype)
        if start + tokens.shape[1] > self.max_seq_len:
            raise DataError(f"sequences have at most max_seq_len = {self.max_seq_len}, got {start + tokens.shape[1]}")
        return hidden + self.position(places)


class MambaWithResidual(MambaPosEncoding):
    """The paper's fix: (x, B, C) = silu(conv(U)) + U, and positions added to the embedding.

    Args:
        max_seq_len, encoding: of `MambaPosEncoding`.
        gated: U multiplies the convolution's result instead.
        options: of `MambaForComposite`.
    """

    _needs_convolution = True

    def __init__(self, *args: Any, max_seq_len: int = 64, gated: bool = False, **options: Any) -> None:
        self._path = "gated" if gated else "residual"
        super().__init__(*args, max_seq_len=max_seq_len, **options)

    def get_config(self) -> dict[str, Any]:
        return {"gated": self._path == "gated", **super().get_config()}


class TransformerForComposite(MambaForComposite):
    """The rival: causal attention with rotary positions and a gated MLP in every block.

    Args:
        n_layers, gamma, vocab_size, d_model, reading, tie_embeddings, device, dtype: of `MambaForComposite`.
        d_conv: taps of a convolution over queries, keys and values; 0 for none.
        n_heads: heads; one, as Mamba has in the paper.
        d_intermediate: width of the MLP; None for 4 * d_model, 0 for none.
        mixer_options: further arguments of `nn.Attention`.
    """

    def __init__(
        self,
        n_layers: int = 2,
        gamma: float | None = 1.0,
        vocab_size: int = 201,
        d_model: int = 32,
        *,
        d_conv: int = 0,
        n_heads: int = 1,
        d_intermediate: int | None = None,
        reading: Reading = "paper",
        tie_embeddings: bool = False,
        mixer_options: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self._config = {
            "n_layers": n_layers,
            "gamma": gamma,
            "vocab_size": vocab_size,
            "d_model": d_model,
            "d_conv": d_conv,
            "n_heads": n_heads,
            "d_intermediate": 4 * d_model if d_intermediate is None else d_intermediate,
            "reading": reading,
            "tie_embeddings": tie_embeddings,
            "mixer_options": dict(mixer_options or {}),
        }
        options = {"n_heads": n_heads, "d_conv": d_conv, **(mixer_options or {})}
        made = {"device": device, "dtype": dtype}
        self._build(Attention, options, made, d_intermediate=self._config["d_intermediate"])


def sinusoids(places: Tensor, width: int) -> Tensor:
    """(places, width) sines and cosines of positions (places,), whose waves lengthen from 2 pi to 10000 * 2 pi."""
    waves = torch.exp(torch.arange(0, width, 2, device=places.device) * (-math.log(10000.0) / width))
    angle = places[:, None] * waves
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


MODELS: dict[str, Callable[..., MambaForComposite]] = {
    "standard": MambaForComposite,
    "ones": MambaOnesConv,
    "learned": partial(MambaPosEncoding, encoding="learned"),
    "sinusoidal": partial(MambaPosEncoding, encoding="sinusoidal"),
    "residual": partial(MambaWithResidual, gated=False),
    "gated": partial(MambaWithResidual, gated=True),
    "transformer": partial(TransformerForComposite, d_conv=0),
    "transformer-conv": partial(TransformerForComposite, d_conv=4),
}
"""The models by the name that a run gives."""
