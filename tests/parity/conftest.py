"""The demo model as `--quantization` makes it, for more than one module: that takes longer than what is asked of it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.model.decoder import Decoder
from settings.schema import ModelSettings

QuantisedDemo = Callable[[str], Decoder]
"""From `--quantization` to the demo model so."""


@pytest.fixture(scope="session")
def quantised_demo(demo_model: Path) -> QuantisedDemo:
    @cache
    def load(quantization: str) -> Decoder:
        settings = ModelSettings(model=str(demo_model), quantization=quantization)  # type: ignore[arg-type]
        return load_decoder(open_checkpoint(str(demo_model)), settings)

    return load
