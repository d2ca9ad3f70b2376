"""Export of an adapter (`eft export`)."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

from runtime.checkpoints import Checkpoint
from runtime.checkpoints.export import check_format
from runtime.checkpoints.export.directory import TEMPLATE, write_model, write_own
from runtime.checkpoints.export.gguf_file import write_lora, write_merged
from runtime.checkpoints.export.merge import Merge, open_merge
from runtime.model.config import ModelLoadError
from runtime.support.durable import fresh_directory, make_directory, replacing, write_file
from runtime.support.peft_files import CONFIG, WEIGHTS
from runtime.text.chat_template import ChatTemplateError
from runtime.text.own_tokens import OwnText


class Exported(Struct, frozen=True):
    """A written export."""

    path: str
    format: str
    type: str | None
    """The type asked for; None: that of the base."""
    bytes: int
    notes: tuple[str, ...] = ()
    """What the files cannot say, in sentences."""


def export_adapter(
    checkpoint: Checkpoint,
    adapter: Path,
    to: Path,
    format: str,
    *,
    type: str | None = None,
    name: str | None = None,
    own: OwnText | None = None,
    also: Sequence[str] = (),
) -> Exported:
    """Write the adapter in the folder `adapter` to `to`, which must not exist: a folder (merged, peft) or a file (gguf,
    gguf-lora); after a crash it is there and whole, or not there.

    `own`: the adapter's tokens, template and ends of answers, which are written in place of the base's. `also`: files
    of the folder that a peft export has, too, where they are there. `type`: f32, f16, bf16, q8_0 or q4_k for gguf;
    float32, float16 or bfloat16 for merged; default: the base's. Raises `InvalidRequest` for a format or type that does
    not exist, `ModelLoadError` and `AdapterInvalid` where the files do not fit, and `OSError`, `FileExistsError` among
    them.
    """
    check_format(format, type)
    if to.exists():
        raise FileExistsError(errno.EEXIST, "it is there already", str(to))
    merge = open_merge(checkpoint, adapter)
    own = _differing(own or OwnText(), merge)
    if format in ("merged", "gguf"):
        merge = replace(merge, checkpoint=_with_own(merge, own))
        if merge.vocabulary is not None:
            merge.vocabulary.check()
    if format == "gguf-lora" and merge.vocabulary is not None:
        raise ModelLoadError(
            "The adapter has rows of its own in embedding and head, and GGUF files of adapters hold low-rank factors "
            "alone: export it as gguf, merged into its base."
        )
    notes = list[str]()
    if format in ("gguf", "gguf-lora"):
        write = write_lora if format == "gguf-lora" else partial(write_merged, type=type, own=own)
        make_directory(to.parent)
        with replacing(to) as path:
            write(path, merge, name=name or to.stem)
    else:
        with fresh_directory(to) as folder:
            if format == "merged":
                write_model(folder, merge.checkpoint, _tensors(merge, type))
                write_own(folder, merge.checkpoint, own)
            else:
                for file in (CONFIG, WEIGHTS, *also):
                    if file not in also or ((adapter / file).is_file() and not (adapter / file).is_symlink()):
                        shutil.copyfile(adapter / file, folder / file)
                if own.template is not None:
                    write_file(folder / TEMPLATE, own.template.encode())
    if own.stop and format in ("merged", "gguf"):
        texts = ", ".join(map(repr, own.stop))
        notes.append(f"Its answers end with a text that is no single token: give {texts} as a stop string.")
    files = [to] if to.is_file() else list(to.iterdir())
    return Exported(str(to), format, type, sum(file.stat().st_size for file in files), tuple(notes))


def _differing(own: OwnText, merge: Merge) -> OwnText:
    """The same without tokens that the base has, or that have no row."""
    tokenizer, rows = merge.checkpoint.tokenizer, merge.vocabulary
    size = max(tokenizer.vocab_size, 0 if rows is None else rows.size)
    tokens = [one for one in own.tokens if one.id < size and tokenizer.token_string(one.id) != one.text]
    return msgspec.structs.replace(own, tokens=tuple(tokens))


def _with_own(merge: Merge, own: OwnText) -> Checkpoint:
    """The base with the adapter's tokenizer, and with the size and the head that the adapter gives it."""
    checkpoint, tokenizer, rows = merge.checkpoint, merge.checkpoint.tokenizer, merge.vocabulary
    size = None if rows is None else rows.size
    try:
        if own.tokens or own.eos_id is not None:
            tokenizer = tokenizer.with_tokens(own.tokens, rows=size, eos_id=own.eos_id)
        if own.template is not None:
            tokenizer = tokenizer.with_template(own.template)
    except ChatTemplateError as error:
        raise ModelLoadError(f"The adapter's own chat template: {error}") from error
    except ValueError as error:
        raise ModelLoadError(f"The adapter's tokens do not fit the model: {error}.") from error
    config = dict(checkpoint.config)
    if own.eos_id is not None:
        config["eos_token_id"] = own.eos_id
    if rows is not None:
        if "vocab_size" not in config:
            raise ModelLoadError(
                f"{checkpoint.name} has its number of ids in another place than vocab_size of config.json: export the "
                "adapter with --format peft."
            )
        config["vocab_size"] = rows.size
        if rows.unties:
            config["tie_word_embeddings"] = False
    return replace(checkpoint, tokenizer=tokenizer, config=config)


def _tensors(merge: Merge, type: str | None) -> Iterator[tuple[str, Tensor]]:
    if type is None:
        yield from merge.tensors()
        return
    for name, tensor in merge.tensors():
        yield name, tensor.to(getattr(torch, type)) if tensor.is_floating_point() else tensor
