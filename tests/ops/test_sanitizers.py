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
sys.modules["mambakit._native"] = native
import mambakit
mambakit._native = native
import pytest
keep = "(cpu or instruction or ensemble) and not opcheck"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", keep, *sys.argv[2:]]))
"""


def _runtime(name: str) -> str | None:
    """The sanitizer's shared library, which must be loaded before Python's own code."""
    if COMPILER is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(found.stdout.strip())
    return str(path) if path.is_absolute() and path.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizer's library, as Linux does")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86-64 instruction sets")
@pytest.mark.parametrize(("isa", "plain_vectors"), [("x86_64_v3", "OFF"), ("x86_64_v2", "ON")])
def test_kernels_run_clean_under_the_sanitizers(isa: str, plain_vectors: str) -> None:
    address = _runtime("libasan.so")
    if address is None:
        pytest.skip("the compiler has no AddressSanitizer library")
    build = ROOT / "build" / f"sanitize-{isa}"
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *(
            "-DMAMBAKIT_SANITIZE=ON",
            f"-DMAMBAKIT_PLAIN_VECTORS={plain_vectors}",
            f"-DMAMBAKIT_INSTRUCTION_SETS={isa}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ),
    ]
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, ["cmake", "--build", str(build)]):
        done = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = build.glob("_native*.so")

    preload = f"{address} {_runtime('libstdc++.so') or ''}"
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
        [sys.executable, "-c", RUN, str(extension), *files],
        cwd=ROOT,
        env={**os.environ, **path, **options},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout
