"""A text is refused by its length only where it could never fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from runtime.checkpoints import open_checkpoint
from runtime.errors import ContextLengthExceeded
from runtime.text import tokenizer as tokenizer_module
from runtime.text.tokenizer import Tokenizer

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(*, without: str = "") -> Backend:
    chars = [char for char in sorted(pre_tokenizers.ByteLevel.alphabet()) if char != without]
    vocab = {char: id for id, char in enumerate([*chars, "aa", "Ġa", "ĠĠ"])}
    backend = Backend(models.BPE(vocab=vocab, merges=[("a", "a"), ("Ġ", "a"), ("Ġ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def composing() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    return backend


def replacing(pattern: object, content: str) -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Replace(pattern, content)  # type: ignore[arg-type]
    return backend


def stripping() -> Backend:
    backend = byte_level()
    backend.normalizer = normalizers.Strip()
    return backend


def swallowing() -> Backend:
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<x>", rstrip=True, lstrip=True, normalized=False)])
    return backend


def splitting(splitter: pre_tokenizers.PreTokenizer) -> Backend:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


def pieces(*, byte_fallback: bool, unknown: str | None = None, fuse: bool = False) -> Backend:
    vocab = {**BYTES, "<unk>": 256, "▁": 257, "a": 258, "▁a": 259, "aa": 260}
    model = models.BPE(
        vocab=vocab, merges=[("▁", "a"), ("a", "a")], byte_fallback=byte_fallback, unk_token=unknown, fuse_unk=fuse
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def words() -> Backend:
    backend = Backend(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


MAKERS: dict[str, tuple[Callable[[], Backend], bool]] = {
    "byte level": (byte_level, True),
    "byte level without a control character": (lambda: byte_level(without="Ą"), True),  # 04
    "byte level without a continuation byte": (lambda: byte_level(without="Ģ"), False),  # 80
    "composing": (composing, True),
    "replacing by something shorter": (lambda: replacing("aaa", "a"), True),
    "replacing by nothing": (lambda: replacing("a", ""), False),
    "replacing an expression": (lambda: replacing(Regex(" +"), " "), False),
    "stripping": (stripping, False),
    "swallowing": (swallowing, True),
    "digits": (lambda: splitting(pre_tokenizers.Digits(individual_digits=True)), True),
    "isolating": (lambda: splitting(pre_tokenizers.Split(Regex("a+"), "isolated")), True),
    "punctuation": (lambda: splitting(pre_tokenizers.Punctuation("merged_with_next")), True),
    "removing": (lambda: splitting(pre_tokenizers.Split("a", "removed")), False),
    "whitespace": (lambda: splitting(pre_tokenizers.WhitespaceSplit()), False),
    "bytes as a fallback": (lambda: pieces(byte_fallback=True, unknown="<unk>", fuse=True), True),
    "unknown": (lambda: pieces(byte_fallback=False, unknown="<unk>"), True),
    "unknown, fused": (lambda: pieces(byte_fallback=False, unknown="<unk>", fuse=True), False),
    "dropped": (lambda: pieces(byte_fallback=False), False),
    "words": (words, False),
}
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text("a \x04<x>é\u0301\u1f82", max_size=80),
    st.builds(
        lambda char, count: char * count, st.sampled_from([" ", "a", "aaa", "\x04", "\u3000", "字"]), st.integers(1, 90)
    ),
)


@pytest.fixture(scope="module", params=MAKERS)
def made(request: pytest.FixtureRequest) -> tuple[Tokenizer, bool]:
    maker, bounded = MAKERS[request.param]
    return Tokenizer(maker()), bounded


def test_which_tokenizers_have_a_bound(made: tuple[Tokenizer, bool]) -> None:
    tokenizer, bounded = made
    assert (tokenizer.text_bound.longest is not None) == bounded
    assert tokenizer.text_bound.exceeded_by("b" * 100_000, 10) == bounded


@given(text=TEXTS)
def test_no_text_exceeds_the_tokens_that_it_has(made: tuple[Tokenizer, bool], text: str) -> None:
    tokenizer, _ = made
    assert not tokenizer.text_bound.exceeded_by(text, len(tokenizer.encode(text, add_special_tokens=False)))


@given(text=TEXTS.map(lambda text: text * 3))
def test_no_text_that_fits_is_refused(made: tuple[Tokenizer, bool], text: str) -> None:
    """However small the limit makes the parts that are tried first."""
    tokenizer, _ = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "SHORT", 0)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=False, max_tokens=max(1, len(ids))) == ids


@pytest.mark.parametrize("name", ["byte level", "stripping", "words"])
def test_what_cannot_fit_is_refused_without_encoding_all_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(MAKERS[name][0]())
    encoded: list[int] = []
    whole = tokenizer._encode

    def count(backend: Backend, text: str, special: bool, limit: int | None) -> list[int]:
        encoded.append(len(text))
        return whole(backend, text, special, limit)

    monkeypatch.setattr(tokenizer, "_encode", count)
    with pytest.raises(ContextLengthExceeded, match="context length is 50 tokens; a text of 2000000 characters"):
        tokenizer.encode("a b " * 500_000, max_tokens=50)
    assert encoded == [2_000_000]


def test_a_long_text_has_the_ids_that_a_short_one_has(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_checkpoint(str(tiny_model)).tokenizer
    text = "The newt crosses the road. <|im_end|> 字 \x00 é 😀 "
    short = tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    chat, decoded = tokenizer.encode_chat(messages), tokenizer.decode(short, skip_special_tokens=False)
    monkeypatch.setattr(tokenizer_module, "SHORT", 0)
    assert tokenizer.encode(text, max_tokens=len(short)) == short
    assert tokenizer.encode_chat(messages, max_tokens=len(chat)) == chat
    assert tokenizer.decode(short, skip_special_tokens=False) == decoded
