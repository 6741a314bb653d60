"""The modules that stand in for mamba_ssm and causal_conv1d, and the finder that makes `import` find them.

`MODULES` is all there is: the path of a module, and the names in it with where each comes from. Packages are made of
the paths. A module outside the table is not found, and the error says which there are.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from mambakit import __version__ as _own_version
from mambakit.compat.adaptation import adapted_spec, is_adapted

# Of which releases the interfaces are; the local part says whose code it is.
VERSIONS = {
    "mamba_ssm": f"2.3.2.post1+mambakit.{_own_version}",
    "causal_conv1d": f"1.7.0+mambakit.{_own_version}",
}

_CONVOLUTIONS = "convolutions:causal_conv1d_fn causal_conv1d_update"
_SCAN = "scans:selective_scan_fn selective_scan_ref mamba_inner_fn"
_SPLIT = "scans:mamba_chunk_scan_combined mamba_split_conv1d_scan_combined"
_MODELS = "language_model:MambaLMHeadModel MixerModel"
_GENERATION = "generation:GenerationMixin decode sample"

# path -> sources, each "module of mambakit.compat:names in it"
MODULES: dict[str, tuple[str, ...]] = {
    "causal_conv1d": (_CONVOLUTIONS,),
    "causal_conv1d.causal_conv1d_interface": (_CONVOLUTIONS,),
    "causal_conv1d.causal_conv1d_varlen": ("convolutions:causal_conv1d_varlen_states",),
    "mamba_ssm": (
        "scans:selective_scan_fn mamba_inner_fn",
        "mamba1:Mamba",
        "mamba2:Mamba2",
        "mamba3:Mamba3",
        "language_model:MambaLMHeadModel",
    ),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (_SCAN,),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.selective_state_update": ("scans:selective_state_update",),
    "mamba_ssm.ops.triton.ssd_combined": (_SPLIT,),
    "mamba_ssm.ops.triton.layer_norm": ("norms:RMSNorm layer_norm_fn rms_norm_fn",),
    "mamba_ssm.ops.triton.layernorm": ("norms:RMSNorm layer_norm_fn rms_norm_fn",),  # its name before 2.0
    "mamba_ssm.ops.triton.layernorm_gated": ("gated_norms:LayerNorm RMSNorm layernorm_fn rmsnorm_fn",),
    "mamba_ssm.modules": (),
    "mamba_ssm.modules.mamba_simple": ("mamba1:Mamba", "language_model:Block"),
    "mamba_ssm.modules.mamba2": ("mamba2:Mamba2",),
    "mamba_ssm.modules.mamba3": ("mamba3:Mamba3",),
    "mamba_ssm.modules.block": ("language_model:Block",),
    "mamba_ssm.modules.mlp": ("language_model:GatedMLP",),
    "mamba_ssm.models": (),
    "mamba_ssm.models.config_mamba": ("language_model:MambaConfig",),
    "mamba_ssm.models.mixer_seq_simple": (_MODELS, "language_model:MambaConfig"),
    "mamba_ssm.utils": (),
    "mamba_ssm.utils.generation": (_GENERATION, "inference:InferenceParams"),
    "mamba_ssm.utils.hf": ("language_model:load_config_hf load_state_dict_hf",),
}


class StandIn(importlib.machinery.ModuleSpec):
    """The spec of a module of the table; by its class such a module is known from a real one."""


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules of `packages`, and tells importlib.metadata of them."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in self.packages:
            return adapted_spec(fullname, path) if is_adapted(fullname) else None
        if fullname not in MODULES:
            served = ", ".join(name for name in MODULES if name.startswith(package))
            raise ModuleNotFoundError(f"mambakit has no stand-in for {fullname}; it has {served}", name=fullname)
        return StandIn(fullname, self, origin="mambakit.compat", is_package=bool(_children(fullname)))

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave it to the import system to make the module."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        module.__doc__ = f"Stands in for {name}, on the kernels of mambakit."
        for source in MODULES[name]:
            home, _, names = source.partition(":")
            holder = importlib.import_module(f"mambakit.compat.{home}")
            for each in names.split():
                setattr(module, each, getattr(holder, each))
        if name in VERSIONS:
            vars(module)["__version__"] = VERSIONS[name]
        # As in the packages stood in for, whose own imports make the modules below them attributes.
        for child in _children(name):
            importlib.import_module(child)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> list[importlib.metadata.Distribution]:
        """The packages' metadata; all of them where the context names none."""
        wanted = None if context is None or context.name is None else context.name.lower().replace("-", "_")
        return [_Metadata(name) for name in sorted(self.packages) if wanted in (None, name)]


class _Metadata(importlib.metadata.Distribution):
    """Name and version, which is what libraries look up."""

    def __init__(self, package: str) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {VERSIONS[package]}\n",
            "top_level.txt": f"{package}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._texts.get(filename)

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


def _children(name: str) -> list[str]:
    return [other for other in MODULES if other.rpartition(".")[0] == name]
