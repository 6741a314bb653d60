"""The settings of a language model, in transformers' form: one class for Mamba-1, -2, -3, FalconMamba and hybrids."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mambakit.errors import DataError
from mambakit.nn import MIXERS

# What transformers itself writes into a config.json, or hands over when it reads one.
_FROM_TRANSFORMERS = {"model_type", "transformers_version", "torch_dtype", "name_or_path", "_name_or_path"}


@strict
class MambaConfig(PreTrainedConfig):
    """Everything needed to build the model again, apart from its weights.

    Args:
        vocab_size: rows of the embedding; tokens beyond the tokenizer's are padding of the matrix.
        hidden_size: width of the hidden vectors.
        num_hidden_layers: blocks.
        mixer: the name of a mixer in `mambakit.nn.MIXERS`, or for a hybrid a list with the name of each block's.
        mixer_options: arguments of the mixer beside its width; for a hybrid of several, such arguments by name.
        mlp_size: width of a gated MLP after every mixer; 0 for none.
        layer_norm_epsilon: added to the mean square in the blocks' norms.
        dropout: share of the embeddings, and of what each block adds, that is dropped in training; no public format
            has a place for it, so a model that is read has none.
        initializer_range: standard deviation of the initial embeddings.
        residual_in_fp32: kept for the formats; the residual is summed in float32 either way.
        pad_vocab_size_multiple: of mamba-ssm's config; `vocab_size` is what it comes to.
        tie_word_embeddings: whether the head's weight is the embedding's.
        use_cache: whether a call in eval mode returns the state.

    Raises:
        DataError: a setting that does not exist, or has no such value.

    >>> MambaConfig(vocab_size=264, hidden_size=64, num_hidden_layers=2, mixer_options={"d_state": 8}).mixer
    'mamba'
    """

    model_type = "mambakit"

    vocab_size: int = 50280
    hidden_size: int = 768
    num_hidden_layers: int = 24
    mixer: str | list[str] = "mamba"
    mixer_options: dict | None = None
    mlp_size: int = 0
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0
    initializer_range: float = 0.02
    residual_in_fp32: bool = True
    pad_vocab_size_multiple: int = 1
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if unknown := set(kwargs) - _FROM_TRANSFORMERS:
            raise DataError(
                f"{sorted(unknown)[0]} is no setting of MambaConfig; what belongs to the mixer goes into "
                "mixer_options, and settings of a public format's config.json are read by from_pretrained"
            )
        self.mixer_options = dict(self.mixer_options or {})
        names = self.mixers
        if unknown := set(names) - set(MIXERS):
            raise DataError(f"mixer must be one of {', '.join(MIXERS)}, got {sorted(unknown)[0]!r}")
        if len(names) != self.num_hidden_layers:
            raise DataError(f"mixer names {len(names)} layers, but num_hidden_layers is {self.num_hidden_layers}")
        if not 0 <= self.dropout < 1:
            raise DataError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.vocab_size % self.pad_vocab_size_multiple != 0:
            raise DataError(f"vocab_size must be a multiple of {self.pad_vocab_size_multiple}, got {self.vocab_size}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Settings from a config.json, ours or one of the public formats'; `kwargs` change some."""
        from mambakit.lm.formats import hugging_face, state_spaces

        for format in (hugging_face, state_spaces):
            if format.recognises(config_dict):
                return super().from_dict(format.read(config_dict), **kwargs)
        return super().from_dict(config_dict, **kwargs)

    @property
    def mixers(self) -> list[str]:
        """The name of each layer's mixer."""
        return [self.mixer] * self.num_hidden_layers if isinstance(self.mixer, str) else self.mixer

    def options_of(self, name: str) -> dict[str, Any]:
        """The arguments of the mixer `name`."""
        options = self.mixer_options or {}
        return dict(options) if len(set(self.mixers)) == 1 else dict(options.get(name, {}))
