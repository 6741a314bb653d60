"""Putting the stand-ins in place, taking them away, and leaving real packages alone."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mambakit import compat
from mambakit.compat.finder import MODULES
from mambakit.errors import DataError

PACKAGES = ("mamba_ssm", "causal_conv1d")
OF_PUBLIC_CODE = [
    "from mamba_ssm import Mamba, Mamba2, Mamba3, MambaLMHeadModel, selective_scan_fn, mamba_inner_fn",
    "from mamba_ssm.modules.mamba_simple import Mamba, Block",
    "from mamba_ssm.modules.mamba2 import Mamba2",
    "from mamba_ssm.modules.mamba3 import Mamba3",
    "from mamba_ssm.modules.block import Block",
    "from mamba_ssm.modules.mlp import GatedMLP",
    "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref, mamba_inner_fn",
    "from mamba_ssm.ops.triton.selective_state_update import selective_state_update",
    "from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined",
    "from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn",
    "from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn",
    "from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, LayerNorm, rmsnorm_fn, layernorm_fn",
    "from mamba_ssm.models.config_mamba import MambaConfig",
    "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel, MixerModel, MambaConfig",
    "from mamba_ssm.utils.generation import InferenceParams, GenerationMixin, decode, sample",
    "from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf",
    "from causal_conv1d import causal_conv1d_fn, causal_conv1d_update",
    "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update",
    "from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states",
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    compat.uninstall()
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real package mamba_ssm on the path."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text('__version__ = "1.real"\n')
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("statement", OF_PUBLIC_CODE)
def test_what_public_code_imports_is_found(statement: str) -> None:
    assert compat.install() == PACKAGES
    exec(statement)


def test_every_module_of_the_table_can_be_imported_first() -> None:
    for name in MODULES:
        compat.install()
        assert importlib.import_module(name).__name__ == name
        compat.uninstall()


def test_modules_below_a_package_are_its_attributes() -> None:
    compat.install()
    import mamba_ssm

    assert mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined.__module__ == "mambakit.compat.scans"


def test_versions_are_found_and_say_whose_code_it_is() -> None:
    compat.install()
    for name, release in (("mamba_ssm", "2.3.2"), ("causal_conv1d", "1.7.0")):
        version = importlib.import_module(name).__version__
        assert version.startswith(release)
        assert "mambakit" in version
        assert importlib.metadata.version(name) == version
        assert importlib.metadata.version(name.replace("_", "-")) == version


def test_other_distributions_are_still_found() -> None:
    compat.install()
    assert importlib.metadata.version("torch")
    assert {"mamba_ssm", "torch"} <= {dist.metadata["Name"] for dist in importlib.metadata.distributions()}


def test_nothing_is_left_after_uninstalling() -> None:
    compat.install()
    importlib.import_module("mamba_ssm.ops.triton.layer_norm")
    assert compat.is_installed()
    compat.uninstall()
    assert not compat.is_installed()
    assert not [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("mamba_ssm")


def test_installing_twice_is_installing_once() -> None:
    compat.install()
    compat.install()
    compat.uninstall()
    assert not compat.is_installed()


def test_a_module_that_has_no_stand_in_is_named_and_so_are_those_that_have() -> None:
    compat.install()
    with pytest.raises(ModuleNotFoundError, match=r"no stand-in for mamba_ssm.modules.mha; it has .*modules.mamba2"):
        importlib.import_module("mamba_ssm.modules.mha")


@pytest.mark.usefixtures("real")
def test_a_real_package_stays() -> None:
    assert compat.install() == ("causal_conv1d",)
    assert importlib.import_module("mamba_ssm").__version__ == "1.real"


@pytest.mark.usefixtures("real")
def test_a_real_package_that_is_imported_stays() -> None:
    importlib.import_module("mamba_ssm")
    assert compat.install() == ("causal_conv1d",)


@pytest.mark.usefixtures("real")
def test_a_real_package_is_replaced_by_force() -> None:
    assert compat.install(force=True) == PACKAGES
    assert "mambakit" in importlib.import_module("mamba_ssm").__version__


@pytest.mark.usefixtures("real")
def test_force_comes_too_late_for_a_package_that_is_imported() -> None:
    importlib.import_module("mamba_ssm")
    with pytest.raises(DataError, match="mamba_ssm is already imported"):
        compat.install(force=True)


def test_a_model_of_transformers_that_was_imported_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    early = types.ModuleType("transformers.models.mamba.modeling_mamba")
    early.causal_conv1d_fn = None
    monkeypatch.setitem(sys.modules, early.__name__, early)
    with pytest.warns(RuntimeWarning, match=r"modeling_mamba\b.* looked for .* install them first"):
        compat.install()


SCRIPT = """
import sys
import mamba_ssm, neighbour
print(mamba_ssm.__version__, sys.argv[1:], __name__, neighbour.WORD)
sys.exit(7)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(SCRIPT)
    (folder / "neighbour.py").write_text("WORD = 'beside'\n")
    return subprocess.run(
        [sys.executable, "-m", "mambakit.compat", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("program", [("program.py",), ("-m", "program")])
def test_a_program_runs_under_the_stand_ins_as_it_is(program: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *program, "one", "--two")
    assert done.returncode == 7, done.stderr
    assert done.stdout.startswith("2.3.2.post1+mambakit")
    assert done.stdout.rstrip().endswith("['one', '--two'] __main__ beside")


def test_a_program_that_is_not_there_is_named_on_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "nowhere.py")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "nowhere.py is not a file" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--force",), ("--unknown", "program.py")])
def test_without_a_program_there_is_a_line_of_usage(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m mambakit.compat")


def test_a_program_is_told_when_a_real_package_stays(tmp_path: Path) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text('__version__ = "1.real"\n')
    done = run(tmp_path, "program.py")
    assert done.stdout.startswith("1.real")
    assert "mamba_ssm is really installed and stays; --force stands in for it" in done.stderr
    assert run(tmp_path, "--force", "-m", "program").stdout.startswith("2.3.2.post1+mambakit")
