"""The extension under AddressSanitizer and UndefinedBehaviorSanitizer, with and without the compiler's vector types."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")

# Stands in for the installed extension before mambakit is imported, then runs the tests of the compiled backend.
RUN = """
import importlib.util, sys
import torch
spec = importlib.util.spec_from_file_location("mambakit._native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
native.use_instruction_set(sys.argv[2])
sys.modules["mambakit._native"] = native
import mambakit
mambakit._native = native
import pytest
keep = "(cpu or instruction or ensemble) and not opcheck"
failed = pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", "-k", keep, *sys.argv[3:]])
sys.exit(failed or native.instruction_set() != sys.argv[2])
"""


def _runtime(name: str) -> str | None:
    """The sanitizer's shared library, which must be loaded before Python's own code."""
    if COMPILER is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(found.stdout.strip())
    return str(path) if path.is_absolute() and path.exists() else None


def _tools() -> dict[str, str]:
    """The environment, with the programs beside this Python first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def extension() -> Path:
    """The extension with x86-64-v3 as it is, and x86-64-v2 with arrays in place of the compiler's vector types."""
    if _runtime("libasan.so") is None:
        pytest.skip("the compiler has no AddressSanitizer library")
    build = ROOT / "build" / "sanitize"
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        "-DMAMBAKIT_SANITIZE=ON",
        "-DMAMBAKIT_PLAIN_VECTORS=x86_64_v2",
        "-DMAMBAKIT_INSTRUCTION_SETS=x86_64_v2;x86_64_v3",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, env=_tools(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (library,) = build.glob("_native*.so")
    return library


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's library, as Linux does")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 instruction sets")
@pytest.mark.parametrize("isa", ["x86-64-v3", "x86-64-v2"])
def test_kernels_run_clean_under_the_sanitizers(extension: Path, isa: str) -> None:
    preload = f"{_runtime('libasan.so')} {_runtime('libstdc++.so') or ''}"
    options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    kernels = (
        "ops/test_selective_scan",
        "ops/test_causal_conv1d",
        "ops/test_ssd",
        "ops/test_mamba3_scan",
        "nn/test_stepper",
        "nn/test_ensemble_stepper",
    )
    files = [str(ROOT / "tests" / f"{name}.py") for name in kernels]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(extension), isa, *files],
        cwd=ROOT,
        env={**_tools(), **options},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
