"""The result of a loader: configuration, tokenizer and weights, from files of any format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.model.config import ModelLoadError
from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from kernels import Weight
    from runtime.checkpoints.safetensors_files import WeightFiles

    TensorReader = Callable[[], Iterator[tuple[str, Weight]]]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose files are found and checked, and whose weights are not read yet."""

    name: str
    """The model's own name, for the API."""
    source: Path
    """The file or directory that it was read from."""
    config: dict[str, Any]
    """The keys and values of a Hugging Face `config.json`."""
    tokenizer: Tokenizer
    reader: TensorReader = field(repr=False)
    """Factory of a fresh iterator over the weights; `tensors` calls it."""
    describer: TensorReader | None = field(default=None, repr=False)
    """As `reader`, from headers alone, where these have all shapes; `described` calls it."""

    files: WeightFiles | None = field(default=None, repr=False)
    """Names and tensors as they are stored, where the files are safetensors."""
    blocks_reader: TensorReader | None = field(default=None, repr=False)
    """As `reader`, where the files hold weights in integers; `blocks` calls it."""

    generation: dict[str, Any] = field(default_factory=dict)
    """The keys and values of a Hugging Face `generation_config.json`; empty where there is none."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end generation."""
        return self.tokenizer.eos_ids

    def tensors(self) -> Iterator[tuple[str, Weight]]:
        """Names and weights, one in memory at a time, on the CPU, with the names, shapes and row order of a
        Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight` is [out, in]).

        A tensor may be a view of a file: copy it before writing to it. A linear that the checkpoint stores in
        integers may be a weight in integers. Raises `ModelLoadError`.
        """
        return self.reader()

    def described(self) -> Iterator[tuple[str, Weight]]:
        """As `tensors`, for names, shapes and types: tensors are without values, on the device `meta`, where that
        saves reading them."""
        return (self.describer or self.reader)()

    def blocks(self) -> Iterator[tuple[str, Weight]]:
        """As `tensors`, but weights stored in integers stay so. Raises `ModelLoadError` where no weight is."""
        if self.blocks_reader is None:
            raise ModelLoadError(f"{self.source}: quantization gguf is for GGUF files; this is not one.")
        return self.blocks_reader()
