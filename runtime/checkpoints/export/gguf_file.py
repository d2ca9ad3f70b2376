"""A merged model, or an adapter alone, as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.export.gguf_metadata import family_of, metadata_of, rope_factors
from runtime.checkpoints.export.merge import Merge
from runtime.checkpoints.gguf.blocks import FORMATS, ByteArray, Floats, dequantise
from runtime.checkpoints.gguf.container import GgufFile, Metadata, TensorInfo
from runtime.checkpoints.gguf.families import find_family
from runtime.checkpoints.gguf.family import GgufFamily
from runtime.checkpoints.gguf.writing import (
    BF16,
    F16,
    F32,
    Q4_K,
    Q8_0,
    TYPES,
    OutTensor,
    Value,
    encode_field,
    quantise,
    type_for,
    value_of,
    write_gguf,
)
from runtime.checkpoints.model_loading import spec_of
from runtime.model.config import ModelLoadError
from runtime.model.lora import LoraPart

FILE_TYPES = {F32: 0, F16: 1, Q8_0: 7, Q4_K: 14, BF16: 32}
"""GGML's number → llama.cpp's number for a file that is mostly of this type."""
FILE_TYPE = "general.file_type"
TEMPLATE = "tokenizer.chat_template"
END_OF_TURN = "tokenizer.ggml.eot_token_id"


def write_merged(path: Path, merge: Merge, *, type: str | None, name: str, template: str | None = None) -> None:
    """Write the merged model.

    `type`: a key of TYPES; default: each tensor as in a GGUF base, where the type can be written, else f16. `template`:
    the source of a chat template other than the base's. Raises `ModelLoadError` for an architecture that GGUF files are
    not written of, and `OSError`.
    """
    wanted = None if type is None else TYPES[type]
    fields, tensors = (
        _from_gguf(merge, wanted)
        if is_gguf(merge.checkpoint)
        else _from_model(merge, F16 if wanted is None else wanted)
    )
    fields["general.name"] = encode_field("general.name", value_of(name))
    if template is not None:
        fields[TEMPLATE] = encode_field(TEMPLATE, value_of(template))
        if (end := merge.checkpoint.tokenizer.turn_end.token_id) is not None:
            fields[END_OF_TURN] = encode_field(END_OF_TURN, value_of(end))
    write_gguf(path, fields, tensors)


def _as_bytes(values: Floats) -> list[ByteArray]:
    return [values.view(np.uint8)]


def is_gguf(checkpoint: Checkpoint) -> bool:
    """True for a model that is a GGUF file."""
    return checkpoint.source.suffix.lower() == ".gguf"


# -- from a GGUF base ------------------------------------------------------------------------------
#
# Metadata and tensors that do not change are copied byte by byte.


def _from_gguf(merge: Merge, wanted: int | None) -> tuple[dict[str, bytes], list[OutTensor]]:
    file = GgufFile(merge.checkpoint.source)
    family = find_family(Metadata(file.fields, file.path), set(file.tensors))
    fields = {key: bytes(file.data[start:end]) for key, (start, end) in file.entries.items()}
    if wanted is not None:
        fields[FILE_TYPE] = encode_field(FILE_TYPE, value_of(FILE_TYPES[wanted]))
    done = set[str]()
    tensors = []
    for info in file.tensors.values():
        full = family.full_name(info.name) if family.knows(info.name) else info.name
        part = merge.parts.get(full)
        done.add(full)
        if part is None and wanted is None:
            tensors.append(_copied(file, info))
        elif part is None:
            type = type_for(wanted or F32, info.shape)
            same = type == info.type or not family.knows(info.name)
            tensors.append(_copied(file, info) if same else _converted(file, info, type))
        else:
            type = type_for(wanted if wanted is not None else _writable(info.type), info.shape)
            tensors.append(OutTensor(info.name, info.shape, type, _changed(merge, file, info, type, family, part)))
    if missing := set(merge.parts) - done:
        raise ModelLoadError(f"{file.path} has no tensor for {min(missing)}, which the adapter changes.")
    return fields, tensors


def _writable(type: int) -> int:
    """The type itself where we can write it; else one that loses less than it did."""
    if type in FILE_TYPES:
        return type
    return Q8_0 if FORMATS[type].values > 1 else F16


def _copied(file: GgufFile, info: TensorInfo) -> OutTensor:
    return OutTensor(info.name, info.shape, info.type, lambda: [_stored(file, info)])


def _stored(file: GgufFile, info: TensorInfo) -> ByteArray:
    return np.frombuffer(file.data, np.uint8, FORMATS[info.type].num_bytes(info.num_elements), info.offset)


def _converted(file: GgufFile, info: TensorInfo, type: int) -> OutTensor:
    return OutTensor(info.name, info.shape, type, lambda: quantise(type, _values(file, info)))


def _values(file: GgufFile, info: TensorInfo) -> Floats:
    return dequantise(FORMATS[info.type], _stored(file, info)).reshape(info.shape)


def _changed(
    merge: Merge, file: GgufFile, info: TensorInfo, type: int, family: GgufFamily, part: LoraPart
) -> Callable[[], Iterator[ByteArray]]:
    def data() -> Iterator[ByteArray]:
        config = merge.checkpoint.config
        [(name, stored)] = family.tensors(info.name, torch.from_numpy(_values(file, info)), config)
        changed = family.file_form(info.name, merge.merged(name, stored, part), config)
        return quantise(type, np.ascontiguousarray(changed.float().numpy()))

    return data


# -- from a model directory ------------------------------------------------------------------------


def _from_model(merge: Merge, wanted: int) -> tuple[dict[str, bytes], list[OutTensor]]:
    checkpoint = merge.checkpoint
    architecture, family = family_of(checkpoint)
    fields = {key: encode_field(key, value) for key, value in metadata_of(checkpoint, architecture).items()}
    fields[FILE_TYPE] = encode_field(FILE_TYPE, value_of(FILE_TYPES[wanted]))
    tensors = [
        OutTensor(name, factors.shape, F32, partial(_as_bytes, factors))
        for name, factors in rope_factors(checkpoint).items()
    ]
    shapes = _shapes(merge, family)
    reader = _InOrder(merge)
    for name, (file_name, shape) in shapes.items():
        type = type_for(wanted, shape)
        tensors.append(OutTensor(file_name, shape, type, _from_reader(reader, family, name, file_name, type)))
    return fields, tensors


def _shapes(merge: Merge, family: GgufFamily) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name → the file's name and shape. Raises `ModelLoadError` for a tensor that the file cannot
    hold."""
    config = _shape_config(merge.checkpoint)
    tied = bool(config.get("tie_word_embeddings"))
    found = {}
    for name, weight in merge.checkpoint.described():
        stored = merge.floats(name, weight)
        file_name = family.file_name(name)
        if file_name == "output.weight" and tied:
            continue
        if file_name is None:
            if name.endswith("inv_freq"):
                continue
            raise _no_place(merge, family, name)
        shape = tuple(family.file_form(file_name, stored, config).shape)
        found[name] = file_name, shape
    return found


def _shape_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration, with the sizes that it may leave out."""
    spec = spec_of(checkpoint)
    return checkpoint.config | {"head_dim": spec.head_dim, "num_key_value_heads": spec.num_kv_heads}


def _no_place(merge: Merge, family: GgufFamily, name: str) -> ModelLoadError:
    return ModelLoadError(f"{merge.checkpoint.name}: GGUF files of {family.architecture} have no place for {name}.")


class _InOrder:
    """The merged tensors in the order in which the checkpoint is read, one in memory at a time."""

    def __init__(self, merge: Merge) -> None:
        self._tensors = merge.tensors()
        self.config = _shape_config(merge.checkpoint)

    def read(self, wanted: str) -> Tensor:
        for name, tensor in self._tensors:
            if name == wanted:
                return tensor
        raise ModelLoadError(f"{wanted} is no longer in the checkpoint.")


def _from_reader(
    reader: _InOrder, family: GgufFamily, name: str, file_name: str, type: int
) -> Callable[[], Iterator[ByteArray]]:
    def data() -> Iterator[ByteArray]:
        tensor = family.file_form(file_name, reader.read(name), reader.config)
        return quantise(type, np.ascontiguousarray(tensor.float().numpy()))

    return data


# -- an adapter alone ------------------------------------------------------------------------------


def write_lora(path: Path, merge: Merge, *, name: str) -> None:
    """Write the adapter without its base, as llama.cpp's `--lora` takes it. Raises as `write_merged`.

    llama.cpp multiplies by alpha over the rank that it sees in a tensor, with one alpha for the file: each part's own
    scale goes into its B.
    """
    if merge.adapter.shape.dora:
        raise ModelLoadError(
            "The adapter has magnitudes (DoRA), and GGUF files of adapters hold low-rank factors alone: export it as "
            "gguf, merged into its base."
        )
    architecture, family = _family(merge.checkpoint)
    fields: Mapping[str, Value] = {
        "general.architecture": value_of(architecture),
        "general.type": value_of("adapter"),
        "general.name": value_of(name),
        FILE_TYPE: value_of(FILE_TYPES[F16]),
        "adapter.type": value_of("lora"),
        "adapter.lora.alpha": value_of(float(merge.adapter.shape.alpha)),
    }
    config = _shape_config(merge.checkpoint)
    tensors = []
    for full, part in merge.parts.items():
        file_name = family.file_name(full)
        if file_name is None:
            raise _no_place(merge, family, full)
        rank = part.a.shape[0]
        b = family.lora_b(file_name, part.b * (part.scale * rank / merge.adapter.shape.alpha), config)
        for letter, factor in (("a", part.a), ("b", b)):
            values = np.ascontiguousarray(factor.float().numpy())
            tensors.append(OutTensor(f"{file_name}.lora_{letter}", values.shape, F32, partial(_as_bytes, values)))
    write_gguf(path, {key: encode_field(key, value) for key, value in fields.items()}, tensors)


def _family(checkpoint: Checkpoint) -> tuple[str, GgufFamily]:
    if is_gguf(checkpoint):
        file = GgufFile(checkpoint.source)
        metadata = Metadata(file.fields, file.path)
        return metadata.architecture, find_family(metadata, set(file.tensors))
    return family_of(checkpoint)
