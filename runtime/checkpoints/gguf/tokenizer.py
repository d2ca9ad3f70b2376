"""The tokenizer in a GGUF file's metadata, rebuilt so that its ids are the original tokenizer's.

Two kinds: `gpt2`, byte-level BPE with its merges, and `llama`, a sentencepiece model of scored pieces.
"""

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from runtime.checkpoints.gguf.container import Metadata, merges_of_pieces
from runtime.model.config import ModelLoadError
from runtime.support.logs import get_logger
from runtime.text.tokenizer import Tokenizer

_log = get_logger(__name__)

KEY = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Kinds of token. Tokens of other kinds are never matched as a whole: 5 is unused, 6 is a single byte."""

ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding")
NEEDED = ("bos", "eos")
"""Required tokens: without them texts begin or end differently from the model's training. For the other tokens
llama.cpp warns where no token has their id, and continues without them; so do we."""

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}"

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+", rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*")
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_PATHS}"
GPT4O = rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_PATHS}"
FALCON = (
    r"[\p{P}\$\+<=>\^~\|`]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    "[0-9]{3}",
)

GPT2_NAMES = ("gpt-2", "default", "olmo")
DIGITS_NAMES = ("smollm", "refact", "starcoder")
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
WORDS = {
    **dict.fromkeys((*LLAMA3_NAMES, "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2"), (QWEN2,)),
    "tekken": (TEKKEN,),
    "gpt-4o": (GPT4O,),
    "falcon": FALCON,
}
SUPPORTED = (*DIGITS_NAMES, *WORDS, *GPT2_NAMES)
"""Values of `tokenizer.ggml.pre`, the rule that cuts text into words before the merges; the expressions are
llama.cpp's."""
WHOLE_WORDS = (*LLAMA3_NAMES, "tekken")
"""Values with which a word that is a token is not merged from its parts, and a BOS comes first."""


def load_tokenizer(metadata: Metadata, vocab_size: int, *, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a file whose embedding has `vocab_size` rows.

    `chat_template` is a template to use instead of the file's. Raises `ModelLoadError`, and
    `ChatTemplateError` for a template that does not compile.
    """
    tokens = metadata.require(metadata.texts(KEY + "tokens"), KEY + "tokens")
    if len(tokens) > vocab_size:
        raise metadata.error(KEY + "tokens", f"are {len(tokens)}, and the embedding has {vocab_size} rows")
    if len(set(tokens)) != len(tokens):
        raise metadata.error(KEY + "tokens", "are not all different")
    kinds = metadata.numbers(KEY + "token_type") or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise metadata.error(KEY + "token_type", f"has {len(kinds)} entries for {len(tokens)} tokens")
    ids = {role: _id(metadata, role, len(tokens)) for role in ROLES}
    try:
        backend = _backend(metadata, tokens, kinds, ids)
    except ModelLoadError:
        raise
    except Exception as error:  # the library raises Exception itself, such as for a merge of unknown tokens
        raise metadata.error(KEY + "*", f"cannot be made into a tokenizer: {error}") from error
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    own = metadata.text("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_ids=[id for role in ("eos", "eot", "eom") if (id := ids[role]) is not None],
        chat_template=chat_template if chat_template is not None else own,
        template_tokens={name: tokens[id] for role, name in names.items() if (id := ids[role]) is not None},
    )


def _backend(metadata: Metadata, tokens: list[str], kinds: list[float], ids: dict[str, int | None]) -> Backend:
    model = metadata.require(metadata.text(KEY + "model"), KEY + "model")
    if model == "gpt2":
        backend, add_bos = _byte_level(metadata, tokens)
    elif model == "llama":
        backend, add_bos = _sentencepiece(metadata, tokens, kinds, ids["unknown"] or 0)
    else:
        raise metadata.error(KEY + "model", f"is {model!r}; supported are: gpt2, llama")
    kind_of = dict(zip(tokens, kinds, strict=True))
    for role in ("bos", "eos", "eot", "eom"):
        # Some converters list the ends of turns as ordinary added tokens, which clients could then write.
        if (id := ids[role]) is not None and kinds[id] == USER_DEFINED:
            kind_of[tokens[id]] = CONTROL
    special = [text for text, kind in kind_of.items() if text and kind in (UNKNOWN, CONTROL)]
    whole = [text for text, kind in kind_of.items() if text and kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in whole])
    _add_around(backend, metadata, tokens, ids, add_bos)
    return backend


def _byte_level(metadata: Metadata, tokens: list[str]) -> tuple[Backend, bool]:
    """A `gpt2` model, and whether a BOS comes before a text unless the file says otherwise."""
    merges = metadata.require(metadata.texts(KEY + "merges"), KEY + "merges")
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge in merges if (cut := merge.find(" ", 1)) > 0]
    if len(pairs) != len(merges):
        raise metadata.error(KEY + "merges", "must be pairs of tokens with a space between them")
    pre = metadata.text(KEY + "pre") or "default"
    if pre not in SUPPORTED:
        raise metadata.error(KEY + "pre", f"is {pre!r}; supported are: {', '.join(SUPPORTED)}")
    vocab = {text: id for id, text in enumerate(tokens)}
    backend = Backend(BPE(vocab=vocab, merges=pairs, ignore_merges=pre in WHOLE_WORDS))
    backend.pre_tokenizer = _pre_tokenizer(pre, metadata.flag(KEY + "add_space_prefix") or False)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend, pre in WHOLE_WORDS


def _pre_tokenizer(pre: str, add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    if pre in GPT2_NAMES:
        return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
    if pre in DIGITS_NAMES:
        # Digits are cut off one by one first, so that " 12" is three words, and not " 1" and "2".
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(words), behavior="isolated") for words in WORDS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False),
        ]
    )


def _sentencepiece(metadata: Metadata, tokens: list[str], kinds: list[float], unknown: int) -> tuple[Backend, bool]:
    """A `llama` model, and whether a BOS comes before a text unless the file says otherwise."""
    scores = metadata.require(metadata.numbers(KEY + "scores"), KEY + "scores")
    if len(scores) != len(tokens):
        raise metadata.error(KEY + "scores", f"has {len(scores)} entries for {len(tokens)} tokens")
    pieces = {
        text: score for text, score, kind in zip(tokens, scores, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)
    }
    model = BPE(
        vocab={text: id for id, text in enumerate(tokens)},
        merges=merges_of_pieces(pieces),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    spaces = normalizers.Replace(" ", "▁")
    restore = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.flag(KEY + "add_space_prefix") is False:
        backend.normalizer = spaces
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        restore.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(restore)
    return backend, True


def _add_around(
    backend: Backend, metadata: Metadata, tokens: list[str], ids: dict[str, int | None], add_bos: bool
) -> None:
    """Make `encode` put a BOS before a text, where the model requires it. It never puts an EOS after it, also with
    `add_eos_token`: a prompt that has ended cannot be continued."""
    asked = metadata.flag(KEY + "add_bos_token")
    bos = ids["bos"] if (add_bos if asked is None else asked) else None
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )


def _id(metadata: Metadata, role: str, num_tokens: int) -> int | None:
    key = f"{KEY}{role}_token_id"
    id = metadata.integer(key)
    if id is None or 0 <= id < num_tokens:
        return id
    if role in NEEDED:
        raise metadata.error(key, f"is {id}, and there are {num_tokens} tokens")
    _log.warning("token_id_ignored", file=str(metadata.path), key=key, id=id, tokens=num_tokens)
    return None
