"""Which variants of the C++ ops are tested: all that run here, or those that the environment names."""

import os

from kernels.cpu import variants

VARIABLE = "EFT_TEST_VARIANTS"
"""Names with commas between them; `.ci/sanitize` sets it, as what checks itself takes long to compile."""

if named := os.environ.get(VARIABLE):
    _all = variants.usable_variants()
    _wanted = [variant for variant in _all if variant.name in named.split(",")]
    if not _wanted:
        raise ValueError(f"{VARIABLE} is {named!r}; this processor can run: {', '.join(v.name for v in _all)}")
    variants.usable_variants = lambda: list(_wanted)
