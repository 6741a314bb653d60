"""Without a C++ compiler the package installs and works, more slowly, and says so."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_EXTENSION = "import sys; sys.modules['mambakit._native'] = None\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", NO_EXTENSION + code], capture_output=True, text=True, check=False, env=dict(os.environ)
    )


def test_layers_run_on_the_portable_backend_and_warn_once() -> None:
    done = run(
        "import torch; from mambakit import nn\n"
        "for mixer in (nn.Mamba(8), nn.Mamba2(16, headdim=8, d_state=4), nn.Mamba3(16, headdim=8, d_state=4)):\n"
        "    y, state = mixer(torch.randn(1, 5, mixer.d_model))\n"
        "    y.sum().backward()\n"
        "print(nn.Stepper(nn.Mamba(8)).backend)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "layers\n"
    assert done.stderr.count("runs on its slower portable backend") == 1


def test_the_doctor_says_what_is_missing_and_checks_the_rest() -> None:
    done = run("import sys; from mambakit.cli import main; sys.argv = ['mambakit', 'doctor']; main()")
    assert done.returncode == 0, done.stderr
    assert "not available: the compiled extension is missing" in done.stdout
    assert "cpu tensors    served by portable" in done.stdout
    assert "all agree" in done.stdout


@pytest.mark.slow
def test_a_failed_compilation_leaves_a_wheel_of_pure_python(tmp_path: Path) -> None:
    command = [
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--quiet",
        str(ROOT),
        "--wheel-dir",
        str(tmp_path / "wheel"),
    ]
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = ["--config-settings", f"build-dir={tmp_path / 'build'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, *options],
        env={**os.environ, **tools, "CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheel").glob("mambakit-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "mambakit/ops/selective_scan.py" in names
    assert not [name for name in names if "_native" in name]
