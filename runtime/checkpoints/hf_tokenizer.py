"""The tokenizer of a Hugging Face directory.

tokenizer.json is used unchanged, as in transformers: its post-processor alone decides whether a BOS comes before a
text; `add_bos_token` in tokenizer_config.json is ignored. Without a tokenizer.json, transformers converts the older
files (a sentencepiece model, or vocab.json and merges.txt).
"""

from collections.abc import Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from runtime.model.config import ConfigError, ModelLoadError, read_optional_json_object
from runtime.text.tokenizer import Tokenizer

# -- special tokens --------------------------------------------------------------------------------
#
# The special tokens that a tokenizer_config.json names, in every spelling that transformers has had for them.
#
# Only templates write special tokens: in a client's text their text stays text, and outputs leave them out. A special
# token that is missed here can be written by clients.

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
"""Keys of further special tokens, in a list, or by name in an object: transformers 4's key and transformers 5's."""


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name → text of the tokens that have one, such as `bos_token`; templates print them by it. Raises `ConfigError`.

    These are the usual ones and a model's own: any key that ends in `_token`, and objects of further tokens.
    """
    own = [key for key in settings if key.endswith("_token") and isinstance(settings[key], str | dict)]
    found = {key: token_text(key, settings.get(key)) for key in (*NAMED, *own)}
    for key in LISTS:
        if isinstance(given := settings.get(key), dict):
            found |= {name: token_text(f"{key}.{name}", value) for name, value in given.items()}
    return {name: text for name, text in found.items() if text is not None}


def special_texts(settings: Mapping[str, Any]) -> Iterator[str]:
    """Texts of the special tokens without a name. Raises `ConfigError`."""
    for key in LISTS:
        given = settings.get(key) or []
        if not isinstance(given, list | dict):
            raise ConfigError(key, given, "a list of tokens, or an object of them by name")
        for index, value in enumerate(given if isinstance(given, list) else given.values()):
            if (text := token_text(f"{key}[{index}]", value)) is not None:
                yield text
    listed = settings.get("added_tokens_decoder") or {}
    for id, entry in listed.items() if isinstance(listed, dict) else ():
        special = isinstance(entry, dict) and entry.get("special") is True
        if special and (text := token_text(f"added_tokens_decoder.{id}", entry)) is not None:
            yield text


def token_text(key: str, value: object) -> str | None:
    """Text of a token, which is written as its text, or as an object with its text and flags; None for null and "".
    Raises `ConfigError`."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    if not isinstance(text, str) or not encodable(text):
        raise ConfigError(key, value, "a token's text, an object with its content, or null")
    return text or None


def encodable(text: str) -> bool:
    """False for a text with half a surrogate pair, which JSON can represent and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


MAX_DIGITS = 10
"""Largest number of digits of a token's id."""
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
    older = read_optional_json_object(directory / "special_tokens_map.json")
    newer = read_optional_json_object(directory / "tokenizer_config.json")
    settings = {**older, **newer}
    backend = _backend(directory)
    try:
        _add_missing_tokens(backend, settings, directory)
        named = named_tokens(settings)
        _make_special(backend, [*named.values(), *special_texts(older), *special_texts(newer)])
        template = _own_template(directory, settings)
    except ConfigError as error:
        raise ModelLoadError(f"{directory / 'tokenizer_config.json'}: {error}.") from None
    bos_id, config_bos = _id(backend, named.get("bos_token")), _ids(config, "bos_token_id", directory / "config.json")
    tokenizer_eos = _id(backend, named.get("eos_token"))
    eos_ids = [
        *_ids(generation_config, "eos_token_id", directory / "generation_config.json"),
        *_ids(config, "eos_token_id", directory / "config.json"),
        *([] if tokenizer_eos is None else [tokenizer_eos]),
    ]
    return Tokenizer(
        backend,
        bos_id=bos_id if bos_id is not None else next(iter(config_bos), None),
        eos_ids=eos_ids,
        chat_template=chat_template if chat_template is not None else template,
        template_tokens=named,
        wants_bos=settings.get("add_bos_token") is True,
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
        # Without this argument transformers prompts on a terminal for permission to run code beside the model.
        known = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        converted: Backend = known.backend_tokenizer
    except Exception as error:  # the model's own tokenizer class may raise anything
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json, and transformers cannot convert its {found[0]}: {error}"
        ) from error
    return converted


def _add_missing_tokens(backend: Backend, settings: Mapping[str, Any], directory: Path) -> None:
    """Add the tokens that only tokenizer_config.json lists. Their ids must follow the existing ones."""
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, dict):
        raise ConfigError("added_tokens_decoder", listed, "an object of tokens by id")
    for key in listed:
        if not (key.isdecimal() and len(key) <= MAX_DIGITS):
            raise ConfigError("added_tokens_decoder", key, "an object of tokens by id")
    for id, entry in sorted(((int(key), value) for key, value in listed.items()), key=itemgetter(0)):
        text = token_text(f"added_tokens_decoder.{id}", entry)
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


def _make_special(backend: Backend, texts: Iterable[str]) -> None:
    """Make the tokens with these texts special, even where tokenizer.json lists them as ordinary ones."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for text in dict.fromkeys(texts):
        known = added.get(text)
        if (known is not None and known.special) or backend.token_to_id(text) is None:
            continue
        token = AddedToken(text, normalized=False, special=True)
        if known is not None:
            token = AddedToken(
                text,
                lstrip=known.lstrip,
                rstrip=known.rstrip,
                single_word=known.single_word,
                normalized=known.normalized,
                special=True,
            )
        backend.add_special_tokens([token])


def _own_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"Cannot read {file}: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    elif isinstance(template, dict):
        template = template.get("default")
    if template is not None and not (isinstance(template, str) and encodable(template)):
        raise ConfigError("chat_template", template, "a text, or several with names")
    return template


def _id(backend: Backend, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def _ids(config: Mapping[str, Any], key: str, file: Path) -> list[int]:
    """Token ids under a key: an integer, a list of them, or null. In some older files -1 means none. Raises
    `ModelLoadError`."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None or value == -1 else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in values):
        raise ModelLoadError(f"{file}: {ConfigError(key, value, 'a token id, a list of them, or null')}.")
    return values
