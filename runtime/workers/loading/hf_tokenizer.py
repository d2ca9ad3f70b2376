"""The tokenizer of a Hugging Face directory.

tokenizer.json is used as it stands, as transformers does it: its post-processor alone says whether a BOS
comes before a text, whatever `add_bos_token` in tokenizer_config.json says. Only when there is none is
transformers asked to convert the older files (a sentencepiece model, or vocab.json and merges.txt).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from runtime.tokenizer import Tokenizer
from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.json_files import read_optional_json_object

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OLDER_FILES = ("tokenizer.model", "vocab.json", "tokenizer.model.v3", "spiece.model")


def load_tokenizer(
    directory: Path,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    *,
    chat_template: str | None = None,
) -> Tokenizer:
    """The tokenizer of a model directory; `chat_template` is a template to use instead of the model's own.

    Raises `ModelLoadError`, and `ChatTemplateError` for a template that does not compile.
    """
    settings = {
        **read_optional_json_object(directory / "special_tokens_map.json"),
        **read_optional_json_object(directory / "tokenizer_config.json"),
    }
    backend = _backend(directory)
    _add_missing_tokens(backend, settings, directory)
    named = {key: text for key in NAMED if (text := _token_text(settings.get(key))) is not None}
    _make_special(backend, named, settings)
    bos_id = _id(backend, named.get("bos_token"))
    eos_ids = [*_ids(generation_config.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    tokenizer_eos = _id(backend, named.get("eos_token"))
    return Tokenizer(
        backend,
        bos_id=bos_id if bos_id is not None else next(iter(_ids(config.get("bos_token_id"))), None),
        eos_ids=eos_ids if tokenizer_eos is None else [*eos_ids, tokenizer_eos],
        chat_template=chat_template if chat_template is not None else _own_template(directory, settings),
        template_tokens=named,
    )


def _backend(directory: Path) -> Backend:
    file = directory / "tokenizer.json"
    try:
        if file.is_file():
            return Backend.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ModelLoadError(f"{file} is not a tokenizer that can be read: {error}") from error
    found = [name for name in OLDER_FILES if (directory / name).is_file()]
    if not found:
        raise ModelLoadError(f"{directory} holds no tokenizer: neither tokenizer.json nor tokenizer.model.")
    from transformers import AutoTokenizer

    try:
        converted: Backend = AutoTokenizer.from_pretrained(directory, local_files_only=True).backend_tokenizer
    except Exception as error:  # whatever the model's own tokenizer class raises
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, and transformers cannot convert its {found[0]}: {error}"
        ) from error
    return converted


def _add_missing_tokens(backend: Backend, settings: Mapping[str, Any], directory: Path) -> None:
    """Tokens that only tokenizer_config.json lists. Their ids must follow the ones that are there."""
    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    for id, entry in sorted((int(key), value) for key, value in listed.items() if key.isdecimal()):
        text = _token_text(entry)
        if text is None or backend.token_to_id(text) is not None:
            continue
        flags = (
            {
                key: entry[key] is True
                for key in ("lstrip", "rstrip", "single_word", "normalized", "special")
                if key in entry
            }
            if isinstance(entry, dict)
            else {}
        )
        backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != id:
            raise ModelLoadError(
                f"{directory / 'tokenizer_config.json'} gives {text!r} the id {id}, but the next free id of "
                f"tokenizer.json is {backend.token_to_id(text)}: the two files do not belong together."
            )


def _make_special(backend: Backend, named: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """A token that has a role is special, even where tokenizer.json lists it as an ordinary one."""
    more = settings.get("additional_special_tokens") or []
    texts = [*named.values(), *(text for entry in more if (text := _token_text(entry)) is not None)]
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for text in dict.fromkeys(texts):
        if text not in special and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])


def _own_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"Cannot read {file}: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: object) -> str | None:
    """A token is written as its text, or as an object with flags."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _id(backend: Backend, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def _ids(value: object) -> list[int]:
    """`eos_token_id` is an integer, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return [id for id in values if isinstance(id, int) and not isinstance(id, bool) and id >= 0]
