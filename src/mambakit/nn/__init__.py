"""Layers: mixers, the block around one, and the stack of blocks.

Every sequence layer is called as torch.nn.LSTM is: `y, state = layer(x, state)`, the state defaulting to none. A whole
sequence, any way of cutting it into chunks, single steps and packed sequences give one result, and gradients flow
through y and through both states.
"""

from mambakit.nn.attention import Attention, AttentionState
from mambakit.nn.backbone import MIXERS, Backbone
from mambakit.nn.bidirectional import Bidirectional
from mambakit.nn.block import Block, GatedMLP
from mambakit.nn.context_parallel import ContextParallel
from mambakit.nn.ensemble_stepper import EnsembleStepper
from mambakit.nn.mamba import Mamba, MambaState
from mambakit.nn.mamba2 import GatedRMSNorm, Mamba2, Mamba2State
from mambakit.nn.mamba3 import Mamba3, Mamba3State
from mambakit.nn.quantised import QuantisedEmbedding, QuantisedLinear
from mambakit.nn.s4d import S4D, S4DState, hippo_legs, initial_modes, legs_modes
from mambakit.nn.stepper import Stepper

__all__ = [
    "Mamba",
    "MambaState",
    "Mamba2",
    "Mamba2State",
    "Mamba3",
    "Mamba3State",
    "S4D",
    "S4DState",
    "hippo_legs",
    "initial_modes",
    "legs_modes",
    "Attention",
    "AttentionState",
    "Bidirectional",
    "GatedMLP",
    "QuantisedLinear",
    "QuantisedEmbedding",
    "GatedRMSNorm",
    "Block",
    "Backbone",
    "Stepper",
    "EnsembleStepper",
    "ContextParallel",
    "MIXERS",
]
