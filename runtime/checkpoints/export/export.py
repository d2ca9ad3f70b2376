"""Export of an adapter (`eft export`)."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from msgspec import Struct
from torch import Tensor

from runtime.checkpoints import Checkpoint
from runtime.checkpoints.export import check_format
from runtime.checkpoints.export.directory import TEMPLATE, write_model, write_template
from runtime.checkpoints.export.gguf_file import write_lora, write_merged
from runtime.checkpoints.export.merge import Merge, open_merge
from runtime.checkpoints.peft.config import CONFIG, WEIGHTS
from runtime.model.config import ModelLoadError
from runtime.support.durable import fresh_directory, make_directory, replacing, write_file
from runtime.text.chat_template import ChatTemplateError
from runtime.text.tokenizer import Tokenizer


class Exported(Struct, frozen=True):
    """A written export."""

    path: str
    format: str
    type: str | None
    """The type asked for; None: that of the base."""
    bytes: int


def export_adapter(
    checkpoint: Checkpoint,
    adapter: Path,
    to: Path,
    format: str,
    *,
    type: str | None = None,
    name: str | None = None,
    template: str | None = None,
) -> Exported:
    """Write the adapter in the folder `adapter` to `to`, which must not exist: a folder (merged, peft) or a file (gguf,
    gguf-lora); after a crash it is there and whole, or not there.

    `template`: source of the chat template that goes with the adapter; it is written in place of the base's.
    `type`: f32, f16, bf16, q8_0 or q4_k for gguf; float32, float16 or bfloat16 for merged; default: the base's. Raises
    `InvalidRequest` for a format or type that does not exist, `ModelLoadError` and `AdapterInvalid` where the files do
    not fit, and `OSError`, `FileExistsError` among them.
    """
    check_format(format, type)
    if to.exists():
        raise FileExistsError(errno.EEXIST, "it is there already", str(to))
    if template is not None:
        checkpoint = replace(checkpoint, tokenizer=_with_template(checkpoint, template))
    merge = open_merge(checkpoint, adapter)
    if format != "peft" and merge.adapter.vocabulary is not None:
        raise ModelLoadError(
            f"The adapter has rows of its own in embedding and head, which the format {format} cannot hold beside the "
            "base's: export it with --format peft, and merge it with PEFT."
        )
    if format in ("gguf", "gguf-lora"):
        write = write_lora if format == "gguf-lora" else partial(write_merged, type=type, template=template)
        make_directory(to.parent)
        with replacing(to) as path:
            write(path, merge, name=name or to.stem)
    else:
        with fresh_directory(to) as folder:
            if format == "merged":
                write_model(folder, checkpoint, _tensors(merge, type))
                if template is not None:
                    write_template(folder, checkpoint)
            else:
                for file in (CONFIG, WEIGHTS):
                    shutil.copyfile(adapter / file, folder / file)
                if template is not None:
                    write_file(folder / TEMPLATE, template.encode())
    files = [to] if to.is_file() else list(to.iterdir())
    return Exported(str(to), format, type, sum(file.stat().st_size for file in files))


def _with_template(checkpoint: Checkpoint, template: str) -> Tokenizer:
    try:
        return checkpoint.tokenizer.with_template(template)
    except ChatTemplateError as error:
        raise ModelLoadError(f"The adapter's own chat template: {error}") from error


def _tensors(merge: Merge, type: str | None) -> Iterator[tuple[str, Tensor]]:
    if type is None:
        yield from merge.tensors()
        return
    for name, tensor in merge.tensors():
        yield name, tensor.to(getattr(torch, type)) if tensor.is_floating_point() else tensor
