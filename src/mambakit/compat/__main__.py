"""`python -m mambakit.compat [--force] SCRIPT ...` or `... -m MODULE ...`: run a program under the stand-ins.

It sees its own arguments and its own folder first on the path, as when Python runs it. torchrun and accelerate launch
take `-m mambakit.compat SCRIPT ...` too.
"""

import runpy
import sys
from pathlib import Path

from mambakit.compat import install
from mambakit.compat.finder import VERSIONS

USAGE = "usage: python -m mambakit.compat [--force] (SCRIPT | -m MODULE) [ARGUMENT ...]"


def main(arguments: list[str]) -> int:
    """Run the program that `arguments` name; its own exit status is the process's. 2 where there is none to run."""
    force = arguments[:1] == ["--force"]
    arguments = arguments[1:] if force else arguments
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{USAGE}\n\nRuns the program with mamba_ssm and causal_conv1d stood in for by mambakit.")
        print("--force: even where they are really installed.")
        return 0
    as_module = arguments[:1] == ["-m"]
    arguments = arguments[1:] if as_module else arguments
    if not arguments or (arguments[0].startswith("-") and not as_module):
        return _refuse(USAGE)
    program = arguments[0]
    if not as_module and not Path(program).is_file():
        return _refuse(f"{program} is not a file. {USAGE}")
    # Before the packages are looked for: a real one may lie beside the program.
    sys.path[0] = str(Path.cwd() if as_module else Path(program).resolve().parent)
    kept = set(VERSIONS) - set(install(force))
    if kept:
        print(f"{', '.join(sorted(kept))} is really installed and stays; --force stands in for it", file=sys.stderr)
    sys.argv = arguments
    if as_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")
    return 0


def _refuse(line: str) -> int:
    print(line, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
