"""A merged model, or an adapter alone, as a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from runtime.checkpoints.checkpoint import Checkpoint
from runtime.checkpoints.export.gguf_metadata import UNUSED, family_of, metadata_of, rope_factors
from runtime.checkpoints.export.merge import Merge, VocabularyMerge
from runtime.checkpoints.gguf.blocks import FORMATS, ByteArray, Floats, dequantise
from runtime.checkpoints.gguf.container import STRING, GgufFile, Metadata, TensorInfo
from runtime.checkpoints.gguf.families import find_family
from runtime.checkpoints.gguf.family import GgufFamily
from runtime.checkpoints.gguf.tokenizer import CONTROL, NORMAL, USER_DEFINED
from runtime.checkpoints.gguf.writing import (
    BF16,
    F16,
    F32,
    FLOAT32,
    INT32,
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
from runtime.text.own_tokens import OwnText

FILE_TYPES = {F32: 0, F16: 1, Q8_0: 7, Q4_K: 14, BF16: 32}
"""GGML's number → llama.cpp's number for a file that is mostly of this type."""
FILE_TYPE = "general.file_type"
TEMPLATE = "tokenizer.chat_template"
END_OF_TEXT = "tokenizer.ggml.eos_token_id"
END_OF_TURN = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
TOKENS, TOKEN_TYPES, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"


def write_merged(path: Path, merge: Merge, *, type: str | None, name: str, own: OwnText) -> None:
    """Write the merged model.

    `type`: a key of TYPES; default: each tensor as in a GGUF base, where the type can be written, else f16. `own`: the
    adapter's tokens, template and ends of answers. Raises `ModelLoadError` for an architecture that GGUF files are not
    written of, for more ends than a file has places for, and `OSError`.
    """
    wanted = None if type is None else TYPES[type]
    fields, tensors = (
        _from_gguf(merge, wanted, own)
        if is_gguf(merge.checkpoint)
        else _from_model(merge, F16 if wanted is None else wanted)
    )
    texts = {"general.name": value_of(name), **_ends(merge.checkpoint, own)}
    if own.template is not None:
        texts[TEMPLATE] = value_of(own.template)
    write_gguf(path, fields | {key: encode_field(key, value) for key, value in texts.items()}, tensors)


def _ends(checkpoint: Checkpoint, own: OwnText) -> dict[str, Value]:
    """The ids that end the adapter's answers, in the places that a file has for such."""
    tokenizer = checkpoint.tokenizer
    found = {} if own.eos_id is None else {END_OF_TEXT: own.eos_id}
    turn, text_end = tokenizer.turn_end.token_id, next(iter(tokenizer.eos_ids), None)
    if own.template is not None or own.end_ids:
        further = [id for id in dict.fromkeys(own.end_ids) if id not in (turn, text_end)]
        wanted = [*([] if turn is None else [turn]), *further]
        if len(wanted) > len(END_OF_TURN):
            raise ModelLoadError(
                f"The adapter's answers end with {', '.join(repr(tokenizer.token_text(id)) for id in wanted)}; a GGUF "
                f"file names {len(END_OF_TURN)} tokens besides the end of a text: export it merged."
            )
        found |= dict(zip(END_OF_TURN, wanted, strict=False))
    return {key: value_of(id) for key, id in found.items()}


def _as_bytes(values: Floats) -> list[ByteArray]:
    return [values.view(np.uint8)]


def is_gguf(checkpoint: Checkpoint) -> bool:
    """True for a model that is a GGUF file."""
    return checkpoint.source.suffix.lower() == ".gguf"


# -- from a GGUF base ------------------------------------------------------------------------------
#
# Metadata and tensors that do not change are copied byte by byte.


def _from_gguf(merge: Merge, wanted: int | None, own_text: OwnText) -> tuple[dict[str, bytes], list[OutTensor]]:
    file = GgufFile(merge.checkpoint.source)
    family = find_family(Metadata(file.fields, file.path), set(file.tensors))
    fields = {key: bytes(file.data[start:end]) for key, (start, end) in file.entries.items()}
    if wanted is not None:
        fields[FILE_TYPE] = encode_field(FILE_TYPE, value_of(FILE_TYPES[wanted]))
    if own_text.tokens or merge.vocabulary is not None:
        fields |= _fields_of_tokens(merge, file)
    done = set[str]()
    tensors = []
    for info in file.tensors.values():
        full = family.full_name(info.name) if family.knows(info.name) else info.name
        part = merge.parts.get(full)
        done.add(full)
        if (own := merge.vocabulary) is not None and (kind := merge.matrix(full)) is not None:
            type = wanted if wanted is not None else _writable(info.type)
            tensors.append(_with_rows(file, info, type, own, kind))
            if kind == "embedding" and own.unties:
                head = family.file_name(own.head_name)
                if head is None:
                    raise _no_place(merge, family, own.head_name)
                tensors.append(replace(_with_rows(file, info, type, own, "head"), name=head))
        elif part is None and wanted is None:
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


def _with_rows(
    file: GgufFile, info: TensorInfo, type: int, own: VocabularyMerge, kind: Literal["embedding", "head"]
) -> OutTensor:
    def data() -> Iterator[ByteArray]:
        return quantise(type, own.rows_in(kind, torch.from_numpy(_values(file, info))).numpy())

    shape = (own.size, *info.shape[1:])
    type = type_for(type, shape)
    return OutTensor(info.name, shape, type, data)


def _fields_of_tokens(merge: Merge, file: GgufFile) -> dict[str, bytes]:
    """The entries of the base's tokens with those of the adapter; none where it has no others."""
    metadata, own = Metadata(file.fields, file.path), merge.vocabulary
    before = metadata.require(metadata.texts(TOKENS), TOKENS)
    texts = list(before)
    added = msgspec.json.decode(merge.checkpoint.tokenizer.definition).get("added_tokens") or []
    size = max([len(texts), *(token["id"] + 1 for token in added)])
    if own is not None and own.size > own.base.size:
        size = own.size
    kinds = [int(kind) for kind in metadata.numbers(TOKEN_TYPES) or [NORMAL] * len(texts)]
    texts += [f"[PAD{id}]" for id in range(len(texts), size)]
    kinds += [UNUSED] * (size - len(kinds))
    for token in added:
        if texts[token["id"]] != token["content"]:
            texts[token["id"]] = token["content"]
            kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if texts == before:
        return {}
    found = {TOKENS: Value(STRING, texts), TOKEN_TYPES: Value(INT32, kinds)}
    if (scores := metadata.numbers(SCORES)) is not None:
        found[SCORES] = Value(FLOAT32, [*map(float, scores), *[0.0] * (size - len(scores))])
    if (key := f"{metadata.architecture}.vocab_size") in file.fields:
        found[key] = value_of(size)
    return {key: encode_field(key, value) for key, value in found.items()}


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
    for name, stored in merge.described():
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
