"""What a loader hands to the model: configuration, tokenizer and weights, whatever file they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.tokenizer import Tokenizer
from runtime.workers.loading.errors import ModelLoadError

if TYPE_CHECKING:
    from kernels import Weight

    TensorReader = Callable[[], Iterator[tuple[str, Weight]]]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk whose files were found and checked, and whose weights have not been read yet."""

    name: str
    """The model's own name, for the API."""
    source: Path
    """The file or directory that it was read from."""
    config: dict[str, Any]
    """The keys and values of a Hugging Face `config.json`."""
    tokenizer: Tokenizer
    reader: TensorReader = field(repr=False)
    """Makes a fresh iterator over the weights; `tensors` calls it."""

    blocks_reader: TensorReader | None = field(default=None, repr=False)
    """The same where the files hold weights in integers; `blocks` calls it."""

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

    def blocks(self) -> Iterator[tuple[str, Weight]]:
        """As `tensors`, but what is stored in integers stays so. Raises `ModelLoadError` where nothing is."""
        if self.blocks_reader is None:
            raise ModelLoadError(f"{self.source}: quantization gguf is for GGUF files; this is not one.")
        return self.blocks_reader()
