"""`mamba_ssm.models`: MambaConfig and MambaLMHeadModel, with their parameter names and their files."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambakit.compat.generation import GenerationMixin
from mambakit.compat.inference import InferenceParams
from mambakit.compat.mamba1 import Mamba
from mambakit.compat.mamba2 import Mamba2
from mambakit.compat.norms import RMSNorm, layer_norm_fn
from mambakit.compat.refusal import NotServed
from mambakit.errors import ArtefactError, DataError

_MIXERS = {"Mamba1": Mamba, "Mamba2": Mamba2}


@dataclasses.dataclass
class MambaConfig:
    """The sizes of a language model, as they stand in config.json; files of Mamba-1 carry some of them."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_layer_idx: list[int] = dataclasses.field(default_factory=list)
    attn_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class CausalLMOutput(NamedTuple):
    """What the model returns."""

    logits: Tensor  # (batch, length, vocabulary)


class GatedMLP(nn.Module):
    """fc2(y silu(gate)) with y, gate = fc1(x); the hidden width is rounded up to a multiple of `multiple_of`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Any = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = math.ceil(hidden / multiple_of) * multiple_of
        self.activation = activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, **made)
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, **made)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))


class Block(nn.Module):
    """Add, norm, mix: `hidden, residual = block(hidden, residual)`, and the same again with an MLP if there is one.

    `mixer_cls`, `mlp_cls` (nn.Identity for none) and `norm_cls` are called with the width `dim`. With
    `fused_add_norm` the norm reads the sum before it is rounded to the dtype of the residual.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Any,
        mlp_cls: Any,
        norm_cls: Any = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise DataError("fused_add_norm goes with nn.LayerNorm and RMSNorm alone")

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **mixer_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Of (batch, length, dim) and the residual before it; `mixer_kwargs` go to the mixer."""
        hidden, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden = self.mixer(hidden, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden, residual = self._add_norm(self.norm2, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The states of the mixer before the first token."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def _add_norm(self, norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return _fused(norm, hidden, residual, self.residual_in_fp32)
        residual = hidden if residual is None else hidden + residual
        hidden = norm(residual.to(norm.weight.dtype))
        return hidden, residual.float() if self.residual_in_fp32 and residual.dtype != torch.float64 else residual


class MixerModel(nn.Module):
    """Embedding, blocks and a last norm: token ids (batch, length) to (batch, length, d_model)."""

    def __init__(
        self,
        d_model: int,
        n_layer: int,
        d_intermediate: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any] | None = None,
        attn_layer_idx: list[int] | None = None,
        attn_cfg: dict[str, Any] | None = None,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = False,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attn_layer_idx or attn_cfg:
            raise NotServed("attn_layer_idx, attn_cfg: the stand-in has no attention layers; mambakit.nn.Attention has")
        options = dict(ssm_cfg or {})
        kind = options.pop("layer", "Mamba1")
        if kind not in _MIXERS:
            raise DataError(f"ssm_cfg's layer must be one of {', '.join(_MIXERS)}, got {kind!r}")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.embedding = nn.Embedding(vocab_size, d_model, **made)

        def norm(dim: int) -> nn.Module:
            return (RMSNorm if rms_norm else nn.LayerNorm)(dim, eps=norm_epsilon, **made)

        def mlp(dim: int) -> nn.Module:
            return GatedMLP(dim, hidden_features=d_intermediate, out_features=dim, **made)

        self.layers = nn.ModuleList()
        for index in range(n_layer):

            def mixer(dim: int, index: int = index) -> nn.Module:
                return _MIXERS[kind](dim, layer_idx=index, **options, **made)

            second = nn.Identity if d_intermediate == 0 else mlp
            block = Block(d_model, mixer, second, norm, fused_add_norm, residual_in_fp32)
            self.layers.append(block)
        self.norm_f = norm(d_model)
        residuals = 1 if d_intermediate == 0 else 2
        _initialise(self, n_layer, n_residuals_per_layer=residuals, **(initializer_cfg or {}))

    def forward(
        self, input_ids: Tensor, inference_params: InferenceParams | None = None, **mixer_kwargs: Any
    ) -> Tensor:
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params, **mixer_kwargs)
        if self.fused_add_norm:
            return _fused(self.norm_f, hidden, residual, self.residual_in_fp32)[0]
        total = hidden if residual is None else hidden + residual
        normed: Tensor = self.norm_f(total.to(self.norm_f.weight.dtype))
        return normed

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer before the first token, by the number of the layer."""
        made = [
            layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs) for layer in self._blocks()
        ]
        return dict(enumerate(made))

    def _blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]


class MambaLMHeadModel(nn.Module, GenerationMixin):
    """A language model: `model(input_ids).logits` (batch, length, vocabulary), the vocabulary padded as configured."""

    def __init__(
        self,
        config: MambaConfig,
        initializer_cfg: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        multiple = config.pad_vocab_size_multiple
        vocabulary = math.ceil(config.vocab_size / multiple) * multiple
        self.backbone = MixerModel(
            config.d_model,
            config.n_layer,
            config.d_intermediate,
            vocabulary,
            config.ssm_cfg,
            config.attn_layer_idx,
            config.attn_cfg,
            rms_norm=config.rms_norm,
            initializer_cfg=initializer_cfg,
            fused_add_norm=config.fused_add_norm,
            residual_in_fp32=config.residual_in_fp32,
            device=device,
            dtype=dtype,
        )
        self.lm_head = nn.Linear(config.d_model, vocabulary, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    def tie_weights(self) -> None:
        """One matrix for embedding and output, where the configuration says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        num_last_tokens: int = 0,
        **mixer_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of input_ids (batch, length), or of the last `num_last_tokens` alone.

        `position_ids` mean nothing to a recurrence and are refused; mixer_kwargs (seq_idx, cu_seqlens) go to the
        mixers.
        """
        if position_ids is not None:
            raise NotServed("position_ids: a recurrence counts its own positions; leave them out")
        hidden = self.backbone(input_ids, inference_params=inference_params, **mixer_kwargs)
        return CausalLMOutput(self.lm_head(hidden[:, -num_last_tokens:] if num_last_tokens > 0 else hidden))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """The states of every layer before the first token, by the number of the layer."""
        return self.backbone.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """Read config.json and pytorch_model.bin of a local folder; kwargs go to the constructor.

        Raises ArtefactError where they are missing or don't go together. Nothing is fetched from a hub.
        """
        sizes = load_config_hf(pretrained_model_name)
        known = {field.name for field in dataclasses.fields(MambaConfig)}
        if strange := sorted(set(sizes) - known):
            raise ArtefactError(f"{pretrained_model_name}: config.json has {', '.join(strange)}, not of mamba_ssm")
        model = cls(MambaConfig(**sizes), device=device, dtype=dtype, **kwargs)
        weights = load_state_dict_hf(pretrained_model_name)
        try:
            model.load_state_dict(weights)
        except RuntimeError as wrong:
            first = str(wrong).splitlines()[-1].strip()
            raise ArtefactError(f"{pretrained_model_name}: weights and config.json disagree: {first}") from wrong
        return model

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json and pytorch_model.bin into a folder, which is made if need be."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / "pytorch_model.bin.part"
        torch.save(self.state_dict(), aside)
        aside.replace(folder / "pytorch_model.bin")
        text = json.dumps(dataclasses.asdict(self.config), indent=4)
        (folder / "config.json").write_text(text, encoding="utf-8")


def load_config_hf(model_name: str | Path) -> dict[str, Any]:
    """config.json of a local folder."""
    sizes: dict[str, Any] = json.loads(_file(model_name, "config.json").read_text(encoding="utf-8"))
    return sizes


def load_state_dict_hf(
    model_name: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """pytorch_model.bin of a local folder, tensors alone, on `device` in `dtype`."""
    weights = torch.load(_file(model_name, "pytorch_model.bin"), map_location="cpu", weights_only=True)
    return {name: tensor.to(device=device, dtype=dtype) for name, tensor in weights.items()}


def _file(model_name: str | Path, name: str) -> Path:
    path = Path(model_name) / name
    if not path.is_file():
        raise ArtefactError(f"{path} does not exist; give a local folder with config.json and pytorch_model.bin")
    return path


def _fused(norm: Any, hidden: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> tuple[Tensor, Tensor]:
    done = layer_norm_fn(
        hidden,
        norm.weight,
        norm.bias,
        residual,
        eps=norm.eps,
        prenorm=True,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=isinstance(norm, RMSNorm),
    )
    return done[0], done[1]


def _initialise(
    model: nn.Module,
    n_layer: int,
    initializer_range: float = 0.02,
    rescale_prenorm_residual: bool = True,
    n_residuals_per_layer: int = 1,
) -> None:
    """Biases 0 but for the steps', embeddings normal, and what writes to the residual smaller the deeper the model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not hasattr(module.bias, "_no_reinit"):
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=initializer_range)
    if rescale_prenorm_residual:
        for name, weight in model.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                with torch.no_grad():
                    weight.div_(math.sqrt(n_residuals_per_layer * n_layer))
