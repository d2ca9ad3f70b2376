"""The same weights in the formats of the peers, written once into a directory of files.

A GGUF file is rewritten tensor by tensor: matrices in the wanted type, everything else as it was. A directory as
Hugging Face's libraries read it is written in float32 from whatever Eft can open.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from safetensors.torch import save_file

from benchmarks.peers.peer import PeerFailed
from runtime.checkpoints import Checkpoint, open_checkpoint

FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
}
"""The types that `gguf` can write."""

_FILE_TYPE = "general.file_type"


def gguf_file(model: str, type: str, directory: Path) -> Path:
    """The model's GGUF file with its matrices in this type; its own file where they are so already.

    Raises `PeerFailed` for a type that cannot be written, and for a model that is no GGUF file.
    """
    if type not in FILE_TYPES:
        raise PeerFailed(f"There is no GGUF type {type!r} here, but {', '.join(FILE_TYPES)}")
    source = open_checkpoint(model).source
    if source.suffix != ".gguf":
        raise PeerFailed(f"{model} is {source}; a peer that reads GGUF files needs one as the model")
    reader = GGUFReader(source)
    if (field := reader.fields.get(_FILE_TYPE)) is not None and field.contents() == FILE_TYPES[type]:
        return source
    return once(directory / f"{source.stem}.{type}.gguf", lambda path: _rewrite(reader, type, path))


def _rewrite(reader: GGUFReader, type: str, path: Path) -> None:
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    writer.add_file_type(FILE_TYPES[type])
    for name, field in reader.fields.items():
        if name in ("general.architecture", _FILE_TYPE) or name.startswith("GGUF."):
            continue  # the writer's own
        array = field.types[0] == GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        wanted = _tensor_type(values.shape, GGMLQuantizationType[type])
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_type(shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """As llama.cpp's own program: vectors stay float32, and rows that no block fits into are float16."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if shape[-1] % block else wanted


def hugging_face_directory(model: str, directory: Path) -> Path:
    """The model as Hugging Face's libraries read it: its own directory, or one in float32 with its tokenizer.

    Raises `PeerFailed` for weights in integers that no float is known of.
    """
    checkpoint = open_checkpoint(model)
    if checkpoint.source.is_dir():
        return checkpoint.source
    return once(directory / f"{checkpoint.source.stem}.float32", lambda path: _export(checkpoint, path))


def _export(checkpoint: Checkpoint, path: Path) -> None:
    tensors = dict(checkpoint.tensors())
    floats = {name: tensor.float().contiguous() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if len(floats) < len(tensors):
        raise PeerFailed(f"{checkpoint.source} stores weights in integers: {min(tensors.keys() - floats.keys())}")
    path.mkdir()
    save_file(floats, path / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, checkpoint.config["architectures"][0]).config_class
    kind(**checkpoint.config).save_pretrained(path)
    (path / "tokenizer.json").write_text(checkpoint.tokenizer.definition)
    end = checkpoint.tokenizer.token_text(checkpoint.eos_ids[0])
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    (path / "tokenizer_config.json").write_text(json.dumps(about))


def once(path: Path, write: Callable[[Path], object]) -> Path:
    """`path`, a file or directory which `write` makes where it is missing; it gets its name when it is complete."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.rename(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    return path
