"""`eft export`: an adapter for other programs, merged into its base or alone."""

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from cyclopts import Parameter

from runtime.cli.adapters import fetch_adapter
from runtime.cli.client import DEFAULT_URL, AdminKey, Url
from runtime.cli.flags import ConfigFile, Json, read_settings, with_settings
from runtime.cli.output import CommandError, UsageError
from runtime.support.peft_files import CONFIG
from settings.schema import ModelSettings

if TYPE_CHECKING:
    from runtime.checkpoints import Checkpoint
    from runtime.workers.export_difference import Difference


@with_settings("model")
def export(
    adapter: Annotated[str, Parameter(help="NAME or NAME@VERSION of a server's adapter, or a folder of PEFT's.")],
    /,
    *,
    to: Annotated[Path, Parameter(help="Folder (merged, peft) or file (gguf, gguf-lora) to make.")],
    format: Annotated[
        Literal["merged", "peft", "gguf", "gguf-lora"],
        Parameter(help="merged: a model directory. peft: the adapter as it is. gguf, gguf-lora: for llama.cpp."),
    ] = "merged",
    type: Annotated[
        str | None,
        Parameter(
            help="gguf: f32, f16, bf16, q8_0 or q4_k; merged: float32, float16 or bfloat16. Default: the base's."
        ),
    ] = None,
    model: Annotated[str | None, Parameter(help="The base model; default: the one that the adapter names.")] = None,
    compare: Annotated[
        bool, Parameter(help="Measure the difference to what is served, with these settings (loads the model twice).")
    ] = True,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    json: Json = False,
    config: ConfigFile = None,
    **flags: Any,
) -> None:
    """Write an adapter for other programs; what exists is left as it is."""
    if to.exists():
        raise UsageError(f"{to} is there already; it is left as it is (--to names another)")
    with ExitStack() as stack:
        folder = Path(adapter)
        name = folder.resolve().name
        if not (folder / CONFIG).is_file():
            name, folder = _from_server(adapter, stack, url, admin_key)
        settings = read_settings(flags, config, model=model or _base_of(folder)).settings
        checkpoint = _open(settings.model, given=model is not None)
        from runtime.adapters.card import CARD, TOKENIZER, read_card, read_tokens
        from runtime.checkpoints.export.export import export_adapter  # imports torch
        from runtime.checkpoints.peft import AdapterInvalid
        from runtime.model.config import ModelLoadError

        try:
            own = read_card(folder).own_text
            own = msgspec.structs.replace(own, tokens=own.tokens or read_tokens(folder))
            also = (CARD, TOKENIZER)
            written = export_adapter(checkpoint, folder, to, format, type=type, name=name, own=own, also=also)
            difference = None
            if compare and format in ("merged", "gguf"):
                from runtime.workers.export_difference import measure_difference

                difference = measure_difference(checkpoint, folder, to, settings.model, settings.adapters.lora_dtype)
        except (ModelLoadError, AdapterInvalid) as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(f"cannot write {to}: {error.strerror or error}") from error
    if json:
        found = {**msgspec.to_builtins(written), "difference": msgspec.to_builtins(difference)}
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    print(f"{name} is in {written.path}: {written.bytes / 1e6:,.1f} MB.")
    for note in written.notes:
        print(note)
    if difference is not None:
        print(_said(difference, settings.model))


def _from_server(adapter: str, stack: ExitStack, url: str, admin_key: str | None) -> tuple[str, Path]:
    """The adapter's name, and a folder with its files that goes away with the stack."""
    name, at, number = adapter.partition("@")
    if at and not number.isdecimal():
        raise UsageError(f"{adapter!r}: expected NAME or NAME@VERSION with a number, or a folder with {CONFIG}")
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eft-export-")))
    asyncio.run(fetch_adapter(directory / name, name, int(number) if at else None, url, admin_key))
    return name, directory / name


def _base_of(folder: Path) -> str | None:
    """The base that an adapter names."""
    try:
        found = msgspec.json.decode((folder / CONFIG).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise CommandError(f"cannot read {folder / CONFIG}: {error}") from error
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) and base else None


def _open(settings: ModelSettings, *, given: bool) -> "Checkpoint":
    from runtime.checkpoints import open_checkpoint
    from runtime.model.config import ModelLoadError

    try:
        return open_checkpoint(settings.model, revision=settings.revision, chat_template=settings.chat_template)
    except ModelLoadError as error:
        if given:
            raise CommandError(str(error)) from error
        raise CommandError(f"the adapter's base cannot be opened here; name it with --model. {error}") from error


def _said(difference: "Difference", settings: ModelSettings) -> str:
    weights = "" if settings.quantization == "none" else f"{settings.quantization} weights and "
    served = f" with {weights}{difference.adapter_dtype} factors"
    return (
        f"Against the adapter as served{served}: {difference.same_tokens:.1%} of {difference.tokens} tokens are the "
        f"same, logits are at most {difference.largest:.2g} apart, divergence {difference.divergence:.2g} nats a token."
    )
