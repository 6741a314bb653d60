"""Language models on the core's backbone, in transformers' form.

    hidden = backbone(embeddings(tokens))
    logits = lm_head(hidden)

Projections are called as modules, in training as in inference, so that an adapter on any of them takes part.
Parameters have the names of transformers' Mamba.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from mambakit.errors import DataError
from mambakit.lm.cache import StateCache, check_batch
from mambakit.lm.config import MambaConfig
from mambakit.lm.loss import next_token_loss
from mambakit.lm.packing import Packing, packing_of
from mambakit.lm.pretrained import MambaPreTrainedModel
from mambakit.nn import Backbone, Stepper
from mambakit.nn.linear import Linear

_NAMES_OF_CACHE = ("cache", "past_key_values", "cache_params")
_NAME_IN_GENERATE = (  # from transformers 5.24 on, and before
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


class _WithCache(ModelOutput):
    """An output whose `cache` goes by its older names too: transformers knew it as `past_key_values` before 5.24."""

    cache: StateCache | None

    @property
    def past_key_values(self) -> StateCache | None:
        """`cache`."""
        return self.cache

    @property
    def cache_params(self) -> StateCache | None:
        """`cache`."""
        return self.cache


@dataclass
class MambaOutput(_WithCache):
    """What MambaModel returns.

    Attributes:
        last_hidden_state: (batch, length, hidden_size), zero for padding.
        cache: the state, to carry on from; also called `past_key_values` and `cache_params`.
        hidden_states: what each block gave and, last, the final norm, if asked for.
    """

    last_hidden_state: Tensor | None = None
    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class MambaCausalLMOutput(_WithCache):
    """What MambaForCausalLM returns.

    Attributes:
        loss: the mean negative log-likelihood in nats of the labels, if there are any.
        logits: (batch, length, vocab_size) in float32; beside a loss in the dtype of the head, for a copy in float32
            is the largest tensor of a training step.
        cache, hidden_states: as in MambaOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: StateCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MambaModel(MambaPreTrainedModel):
    """The model without its head: tokens to hidden vectors.

    >>> model = MambaModel(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2))
    >>> model(torch.randint(264, (2, 10))).last_hidden_state.shape
    torch.Size([2, 10, 32])
    """

    stack: Backbone

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        try:
            stack = Backbone(
                config.hidden_size,
                config.num_hidden_layers,
                config.mixer,
                config.mixer_options,
                d_intermediate=config.mlp_size,
                norm_eps=config.layer_norm_epsilon,
                dropout=config.dropout,
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"mixer_options do not fit {config.mixer}: {error}") from error
        # Its modules are registered here, under the public names, and not a second time below another one.
        self.layers, self.norm_f = stack.layers, stack.norm_f
        self.__dict__["stack"] = stack
        self.gradient_checkpointing = False
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "embeddings" and isinstance(value, nn.Module) and not isinstance(value, nn.Embedding):
            _untie(value)
        super().__setattr__(name, value)

    def get_base(self) -> "MambaModel":
        """Itself; of a model with a head the one without."""
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.embeddings = value  # type: ignore[assignment]

    def initial_state(self, batch: int = 1) -> tuple[Any, ...]:
        """The state before the first token."""
        with torch.no_grad():
            empty = self.norm_f.weight.new_empty(batch, 0, self.config.hidden_size)
            return self.stack(empty)[1]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,
        cache_params: StateCache | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MambaOutput | tuple[Any, ...]:
        """Read tokens.

        Args:
            input_ids: (batch, length); or inputs_embeds, (batch, length, hidden_size).
            attention_mask: (batch, length) or (batch, past + length), 0 for padding, on whichever side: a padded
                position leaves every state untouched.
            cache: what an earlier call returned, to carry on from; `past_key_values` and `cache_params` are its other
                names, of which one may be given.
            position_ids: (batch, length), 0 where a new document starts.
            cu_seqlens: (documents + 1,), their bounds in a batch of one row.
            use_cache: whether to return the state; None: as configured in eval mode, not in training.
            output_hidden_states: whether to return what each block gave.
            return_dict: False for a plain tuple.
            kwargs: the bounds of documents as a packing collator names them: cu_seq_lens_q, cu_seq_lens_k, seq_idx,
                max_length_q, max_length_k.

        Raises ValueError for shapes that don't fit; TypeError for an argument that does not exist.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        cu_seqlens = _document_bounds(cu_seqlens, kwargs)
        cache = _by_any_name(cache=cache, past_key_values=past_key_values, cache_params=cache_params)
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        packing = packing_of(
            *hidden.shape[:2], attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
        )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and (packing is None or packing.one_a_row)
        if packing is not None and not packing.one_a_row and (use_cache or (cache is not None and cache.state)):
            raise ValueError("rows of several documents have no state to carry on from: call with use_cache=False")
        state = None if cache is None else cache.state
        if state is not None:
            check_batch(state, hidden.shape[0])
        length = hidden.shape[1]
        hidden, after, between = self._run(hidden, state, packing, bool(output_hidden_states))
        if use_cache:
            cache = StateCache() if cache is None else cache
            cache.advance(after, length)
        output = MambaOutput(hidden, cache if use_cache else None, between)
        return output if return_dict is None or return_dict else output.to_tuple()

    def _run(
        self, hidden: Tensor, state: tuple[Any, ...] | None, packing: Packing | None, keep: bool
    ) -> tuple[Tensor, tuple[Any, ...], tuple[Tensor, ...] | None]:
        """The blocks and the final norm; the state after them; what each gave, if `keep`."""
        _check_convolutions(self.layers)
        bounds = None if packing is None else packing.cu_seqlens
        shown = (lambda h: h) if packing is None else packing.unpack
        hidden = hidden if packing is None else packing.pack(hidden)
        after, between = [], []
        for index, layer in enumerate(self.layers):
            before = None if state is None else state[index]
            call: Any = layer
            if self.gradient_checkpointing and self.training:
                call = partial(self._gradient_checkpointing_func, layer.__call__)
            hidden, layer_state = call(hidden, before, cu_seqlens=bounds)
            after.append(layer_state)
            if keep:
                between.append(shown(hidden))
        hidden = shown(self.norm_f(hidden.to(self.norm_f.weight.dtype)))
        return hidden, tuple(after), (*between, hidden) if keep else None


class MambaForCausalLM(MambaPreTrainedModel, GenerationMixin):
    """The model with its head: tokens to logits; generates by transformers' `generate`.

    >>> model = MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2))
    >>> model(torch.randint(264, (2, 10))).logits.shape
    torch.Size([2, 10, 264])
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012 - transformers reads a dict

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        self.backbone = MambaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = next_token_loss
        self.post_init()

    def get_base(self) -> MambaModel:
        """The model without its head."""
        return self.backbone

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.backbone.set_input_embeddings(value)

    def stepper(self, batch: int) -> Stepper:
        """What steps from tokens (batch,) to the logits (batch, vocab_size) of the next, in one native call."""
        _check_convolutions(self.backbone.layers)
        return Stepper(self.backbone.stack, batch, embedding=self.backbone.embeddings, head=self.lm_head)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put another head in its place."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StateCache | None = None,
        past_key_values: StateCache | None = None,
        cache_params: StateCache | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MambaCausalLMOutput | tuple[Any, ...]:
        """Read tokens and predict the next of each.

        Args:
            labels: (batch, length), the tokens themselves, -100 where none is to be predicted; they are shifted here,
                and the first token of a document never is predicted from what stands before it.
            logits_to_keep: how many positions at the end, or which, get logits; 0 for all.
            num_items_in_batch: what the sum of the loss is divided by; None for the number of labels.

        The others, and what is raised, are as in MambaModel.
        """
        if cu_seqlens is None:
            cu_seqlens = _document_bounds(None, kwargs)
            kwargs = {}
        outputs = self.backbone(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=_by_any_name(cache=cache, past_key_values=past_key_values, cache_params=cache_params),
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept].to(getattr(self.lm_head, "weight", hidden).dtype))
        loss = None
        if labels is None:
            logits = logits.float()
        if labels is not None:
            if logits.shape[1] != hidden.shape[1]:
                raise ValueError("labels need the logits of all positions: leave logits_to_keep out")
            packing = packing_of(
                *hidden.shape[:2], attention_mask=attention_mask, position_ids=position_ids, cu_seqlens=cu_seqlens
            )
            loss = self.loss_function(
                logits=logits,
                labels=labels if packing is None else packing.labels(labels),
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        output = MambaCausalLMOutput(loss, logits, outputs.cache, outputs.hidden_states)
        return output if return_dict is None or return_dict else output.to_tuple()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What `generate` calls the model with."""
        kwargs.pop("tokenizer", None)  # that of stop_strings, which it leaves among the model's arguments
        inherited: Any = super()
        prepared: dict[str, Any] = inherited.prepare_inputs_for_generation(*args, **kwargs)
        return prepared

    def _prepare_cache_for_generation(  # type: ignore[override]  # what it stands in for returns nothing either
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` a cache of ours; transformers would choose one by the name of the class."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is one of attention: leave it out"
            )
        cache = _by_any_name(**{name: model_kwargs.pop(name, None) for name in _NAMES_OF_CACHE})
        if cache is None and generation_config.use_cache is not False:
            cache = StateCache()
        model_kwargs[_NAME_IN_GENERATE] = cache

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Carry the cache on by the name that this release of transformers has for it."""
        inherited: Any = super()
        updated: dict[str, Any] = inherited._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        updated[_NAME_IN_GENERATE] = outputs.get("cache")
        return updated


def _by_any_name(**given: StateCache | None) -> StateCache | None:
    """The cache by whichever of its names; ValueError for two of them."""
    named = {name: cache for name, cache in given.items() if cache is not None}
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are one argument: give one of them")
    return next(iter(named.values()), None)


def _document_bounds(cu_seqlens: Tensor | None, named_by_collators: dict[str, Any]) -> Tensor | None:
    """cu_seqlens by whichever of its names; raises TypeError for names that are none of them."""
    found = dict(named_by_collators)
    bounds, keys = found.pop("cu_seq_lens_q", None), found.pop("cu_seq_lens_k", None)
    sequence_of_token = found.pop("seq_idx", None)
    found.pop("max_length_q", None)  # these two follow from the bounds
    found.pop("max_length_k", None)
    if found.pop("output_attentions", False):
        raise ValueError("output_attentions is not supported: a state-space model has none")
    if found:
        raise TypeError(f"unexpected argument {sorted(found)[0]!r}")
    if bounds is not None and keys is not None and not torch.equal(bounds, keys):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ: expected the same bounds of documents")
    if cu_seqlens is None and bounds is None and sequence_of_token is not None:
        if sequence_of_token.shape[0] != 1:
            raise ValueError("seq_idx needs a batch of one row")
        bounds = F.pad(torch.unique_consecutive(sequence_of_token[0], return_counts=True)[1].cumsum(0), (1, 0))
    return bounds if cu_seqlens is None else cu_seqlens


def _untie(adapter: nn.Module) -> None:
    """Give an adapter around the embedding a weight of its own, so that merging it leaves a tied head as it was."""
    for module in adapter.modules():
        if isinstance(module, nn.Embedding):
            weight = module.weight
            module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)


def _check_convolutions(layers: nn.ModuleList) -> None:
    """Refuse an adapter on a convolution, whose weight the core reads: it would have no effect."""
    for layer in layers:
        if type(convolution := getattr(layer.mixer, "conv1d", None)) not in (nn.Conv1d, type(None)):
            raise DataError(
                f"conv1d is a {type(convolution).__name__}, which would have no effect: leave conv1d out of "
                "target_modules; in_proj, x_proj, dt_proj, out_proj and embeddings can be adapted"
            )


AutoConfig.register("mambakit", MambaConfig, exist_ok=True)
AutoModel.register(MambaConfig, MambaModel, exist_ok=True)
AutoModelForCausalLM.register(MambaConfig, MambaForCausalLM, exist_ok=True)
