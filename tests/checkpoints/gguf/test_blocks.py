"""Block formats against the `gguf` package's own dequantisation, value for value."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from runtime.checkpoints.gguf.blocks import FORMATS, VALUES_AT_ONCE, dequantise, type_name

BLOCKS = [type for type, format in FORMATS.items() if format.values > 1]


@pytest.mark.parametrize("type", BLOCKS, ids=type_name)
def test_random_blocks_equal_the_reference(type: int) -> None:
    """Any bytes are a valid block; those whose scales are infinite or not a number must agree as well."""
    format = FORMATS[type]
    # More than is converted at once, and not a multiple of it.
    count = VALUES_AT_ONCE // format.values + 37
    blocks = np.random.default_rng(type).integers(0, 256, size=(count, format.size), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks, GGMLQuantizationType(type)).reshape(-1)
        got = dequantise(format, blocks.reshape(-1))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_values_come_back(name: str) -> None:
    """What the reference quantises comes back to within half a step of the format."""
    type = GGMLQuantizationType[name]
    values = np.random.default_rng(1).uniform(-1, 1, size=(8, 64)).astype(np.float32)
    packed = quants.quantize(values, type)
    got = dequantise(FORMATS[type], packed.reshape(-1).view(np.uint8)).reshape(values.shape)
    floats = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}
    step = floats.get(name, {"4": 2 / 15, "5": 2 / 31}.get(name[1], 0.0))
    assert np.abs(got - values).max() <= step


def test_bfloat16_keeps_special_values() -> None:
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x7FC0, 0x8000], dtype=np.uint16)
    got = dequantise(FORMATS[30], bits.view(np.uint8))
    np.testing.assert_array_equal(got, np.array([1.0, -2.0, np.inf, np.nan, -0.0], dtype=np.float32))


def test_names_of_types_are_ggmls() -> None:
    for type in GGMLQuantizationType:
        if not type_name(type.value).startswith("type "):
            assert type_name(type.value) == type.name
