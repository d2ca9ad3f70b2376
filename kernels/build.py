"""`python -m kernels.build`: compiles the CPU kernels for every instruction set of this architecture.

Run when Eft is installed. Without a compiler it says so and succeeds: the reference ops serve.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from kernels.cpu.build import BuildError, find_compiler, library
from kernels.cpu.variants import all_variants


def main() -> int:
    """Exit code 1 when a compiler is there and fails."""
    if find_compiler() is None:
        sys.stderr.write("eft: no C++ compiler (g++ or clang++), so the slower reference ops will serve\n")
        return 0
    failed = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        builds = {variant: pool.submit(library, variant) for variant in all_variants()}
    for variant, build in builds.items():
        try:
            sys.stderr.write(f"eft: kernels for {variant.name}: {build.result()}\n")
        except BuildError as error:
            failed = 1
            sys.stderr.write(f"eft: kernels for {variant.name}: {error}\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
