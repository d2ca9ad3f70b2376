"""`python -m kernels.build`: compiles the CPU kernels for every instruction set of this architecture.

Run when Eft is installed; `eft kernels build` compiles those for this machine alone. Without a compiler it says so and
succeeds: the reference ops serve.
"""

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from kernels.cpu.build import BuildError, find_compiler, library
from kernels.cpu.variants import Variant, all_variants


def main(variants: Sequence[Variant] | None = None) -> int:
    """Compile `variants`, by default all of this architecture. Exit code 1 when a compiler is there and fails."""
    if find_compiler() is None:
        _say("no C++ compiler (g++ or clang++), so the slower reference ops will serve")
        return 0
    variants = all_variants() if variants is None else variants
    names = ", ".join(variant.name for variant in variants)
    _say(f"compiling C++ kernels for {names}; once, and it may take minutes")
    failed = 0
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        builds = {pool.submit(library, variant): variant.name for variant in variants}
        for done, build in enumerate(as_completed(builds), start=1):
            try:
                outcome = str(build.result())
            except BuildError as error:
                failed = 1
                outcome = str(error)
            _say(f"{done} of {len(builds)} after {time.monotonic() - start:.0f} s: {builds[build]}: {outcome}")
    return failed


def _say(text: str) -> None:
    sys.stderr.write(f"eft: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
