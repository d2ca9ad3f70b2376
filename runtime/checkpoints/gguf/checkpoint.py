"""GGUF files, the format of llama.cpp: weights, configuration and tokenizer in one file.

Quantised weights become float32 while they are read, or are kept as they are if their format is simple. Floats are
views of the mapped file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.gguf.blocks import FORMATS, ByteArray, Floats, dequantise, type_name
from runtime.checkpoints.gguf.container import GgufFile, Metadata, TensorInfo, generation_of
from runtime.checkpoints.gguf.families import find_family
from runtime.checkpoints.gguf.family import FACTORS, GgufFamily, GgufSource
from runtime.checkpoints.gguf.tokenizer import load_tokenizer
from runtime.checkpoints.safetensors_files import drop_pages
from runtime.model.config import ModelLoadError

if TYPE_CHECKING:
    import torch

    from kernels import GroupedWeight, Weight


COMPUTED = (".attn_rot_embd.weight", ".rope_freqs.weight", ".attn_rot_embd")
"""Ends of the names of tables that older files have in every layer, and that llama.cpp leaves out as well."""

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Formats that torch supports directly → torch's name."""


def open_gguf(path: Path, *, name: str | None = None, chat_template: str | None = None) -> Checkpoint:
    """Check a GGUF file and read everything but its weights. `name` defaults to the file's, without .gguf.

    `chat_template` is the source of a template to use instead of the file's. Raises `ModelLoadError`.
    """
    file = GgufFile(path)
    metadata = Metadata(file.fields, path)
    if (metadata.integer("split.count") or 1) > 1:
        raise ModelLoadError(f"{path} is a part of a split model: join the parts with llama-gguf-split --merge.")
    for name in [name for name in file.tensors if name.endswith(COMPUTED)]:
        del file.tensors[name]
    family = find_family(metadata, set(file.tensors))
    for info in file.tensors.values():
        _check(info, file, family)
    factors = {name: _values(file.tensors.pop(name), file) for name in FACTORS if name in file.tensors}
    config = {"architectures": [family.architecture], **family.config(GgufSource(metadata, file.tensors, factors))}
    return Checkpoint(
        name=name or path.stem,
        source=path,
        config=config,
        tokenizer=load_tokenizer(metadata, config["vocab_size"], chat_template=chat_template),
        reader=lambda: _tensors(file, family, config),
        blocks_reader=lambda: _tensors(file, family, config, keep=True),
        generation=generation_of(metadata),
    )


def _check(info: TensorInfo, file: GgufFile, family: GgufFamily) -> None:
    """Check a tensor before it is read. Raises `ModelLoadError` for everything that could fail then."""
    if info.name not in FACTORS and not family.knows(info.name):
        raise ModelLoadError(f"{file.path}: {family.architecture} has no tensor {info.name!r}.")
    if info.type not in FORMATS:
        supported = ", ".join(format.name for format in FORMATS.values())
        raise ModelLoadError(
            f"{file.path}: {info.name} is in {type_name(info.type)}, which is not supported; supported are: "
            f"{supported}."
        )
    format = FORMATS[info.type]
    if info.shape[-1] % format.values:
        raise ModelLoadError(
            f"{file.path}: rows of {info.name} have {info.shape[-1]} values, and blocks of {format.name} "
            f"{format.values}."
        )
    end = info.offset + format.num_bytes(info.num_elements)
    if end > len(file.data):
        raise ModelLoadError(
            f"{file.path} is cut off: {info.name} ends at byte {end}, the file at {len(file.data)}. "
            "Is the download complete?"
        )


def _tensor(info: TensorInfo, file: GgufFile) -> torch.Tensor:
    """The tensor: floats as a view of the file, blocks as float32."""
    import torch

    if (name := FLOATS.get(FORMATS[info.type].name)) is None:
        return torch.from_numpy(_values(info, file))
    dtype: torch.dtype = getattr(torch, name)
    return torch.frombuffer(file.data, dtype=dtype, count=info.num_elements, offset=info.offset).view(info.shape)


def _values(info: TensorInfo, file: GgufFile) -> Floats:
    return dequantise(FORMATS[info.type], _bytes(info, file)).reshape(info.shape)


def _bytes(info: TensorInfo, file: GgufFile) -> ByteArray:
    size = FORMATS[info.type].num_bytes(info.num_elements)
    return np.frombuffer(file.data, dtype=np.uint8, count=size, offset=info.offset)


def _tensors(
    file: GgufFile, family: GgufFamily, config: dict[str, Any], *, keep: bool = False
) -> Iterator[tuple[str, Weight]]:
    """Names and weights in Hugging Face's form. `keep`: matrices in Q4_0, Q4_1 and Q8_0 stay in integers."""
    for info in file.tensors.values():
        try:
            weight = kept(info, _bytes(info, file)) if keep else None
            if weight is not None:
                yield family.weight(info.name, weight, config)
            else:
                yield from family.tensors(info.name, _tensor(info, file), config)
            drop_pages(file.data, info.offset, info.offset + FORMATS[info.type].num_bytes(info.num_elements))
        except ModelLoadError as error:
            raise ModelLoadError(f"{file.path}: {info.name}: {error}") from error


# -- matrices in integers --------------------------------------------------------------------------
#
# GGUF's simple blocks as weights in integers, without loss: 32 inputs, a scale in float16, perhaps a minimum.

Q4_0, Q4_1, Q8_0 = 2, 3, 8


def kept(info: TensorInfo, data: ByteArray) -> GroupedWeight | None:
    """A matrix in integers, unchanged; None for another format, or for values that the ops do not take."""
    import torch

    from kernels import Int4Weight, Int8GroupWeight

    if info.type not in (Q4_0, Q4_1, Q8_0) or len(info.shape) != 2:
        return None
    out, size = info.shape
    blocks = data.reshape(out, -1, FORMATS[info.type].size)
    scales = _half(blocks, 0)
    if not scales.isfinite().all():
        return None
    if info.type == Q8_0:
        values = torch.from_numpy(blocks[:, :, 2:].view(np.int8).reshape(out, -1).copy())
        return Int8GroupWeight(values, scales, size) if int(values.min()) > -128 else None
    packed = torch.from_numpy(blocks[:, :, -16:].reshape(out, -1).copy())
    # Q4_0 is scale * (q - 8): eight scales are a float16 as one is, unless they are too large for it.
    minimums = _half(blocks, 2) if info.type == Q4_1 else scales * -8
    return Int4Weight(packed, scales, minimums, size) if minimums.isfinite().all() else None


def _half(blocks: ByteArray, at: int) -> torch.Tensor:
    """[out, groups]: the float16 at byte `at` of each block."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[:, :, 0].copy())
