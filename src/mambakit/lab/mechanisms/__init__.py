"""Mechanisms: what goes on inside a model, by one vocabulary of hooks for Mamba-1, -2 and -3.

`mambakit.lab.mechanisms.hooks` has the table of names. The hooked path is the layers' own, its gate left open, and
gives their results; gradients flow through it.

>>> model = nn.Backbone(16, 2, "mamba2", {"headdim": 8})
>>> output, cache = run_with_cache(model, torch.randn(1, 10, 16), "layers.*.mixer.mixing")
>>> cache["layers.1.mixer.mixing"].shape  # (batch, heads, length, length)
torch.Size([1, 4, 10, 10])
"""

from mambakit.lab.mechanisms.attribution import Attribution, logit_attribution, source_attribution
from mambakit.lab.mechanisms.hooks import Cache, Hook, hook_names, hooked, run_with_cache, run_with_hooks
from mambakit.lab.mechanisms.interventions import blocked, patch, patching_effects, substituted
from mambakit.lab.mechanisms.lenses import convolution_taps, delta_trace, logit_lens, tap_cosine
from mambakit.lab.mechanisms.probes import Probe, fit_probe

__all__ = [
    "run_with_cache",
    "run_with_hooks",
    "hooked",
    "hook_names",
    "Cache",
    "Hook",
    "patch",
    "patching_effects",
    "substituted",
    "blocked",
    "logit_lens",
    "delta_trace",
    "convolution_taps",
    "tap_cosine",
    "logit_attribution",
    "source_attribution",
    "Attribution",
    "fit_probe",
    "Probe",
]
