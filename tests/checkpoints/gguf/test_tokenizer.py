"""Tokenizers rebuilt from GGUF metadata: ids must be those of the tokenizer that the file was made from."""

import inspect
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_IN_TRANSFORMERS

from runtime.checkpoints.gguf.container import Metadata, merges_of_pieces
from runtime.checkpoints.gguf.tokenizer import LLAMA3, QWEN2, SUPPORTED, WORDS, _pre_tokenizer, load_tokenizer
from runtime.model.config import ModelLoadError
from runtime.text.tokenizer import Tokenizer
from tests.checkpoints.gguf.files import bpe_vocabulary
from tests.tiny import CORPUS

TEXTS = [
    "The newt is 1234 years old, isn't it?  It'S 56.7% ² ½ ٣٤٥!",
    "def add(a, b):\n    return a + b\n\n\n\t# done \r\n",
    "naïve café – “quoted” 日本語 한국어 😀👩‍👩‍👧 e\u0301",
    " leading and trailing ",
    "",
]


def loaded(**fields: Any) -> Tokenizer:
    """A tokenizer from the metadata `tokenizer.ggml.…`."""
    metadata = {"general.architecture": "llama"}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    return load_tokenizer(Metadata(metadata, Path("it.gguf")), len(fields["tokens"]))


@pytest.fixture(scope="module")
def original(tiny_model: Path) -> Backend:
    return Backend.from_file(str(tiny_model / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_gpt2_ids_are_the_original_ones(tiny_model: Path, original: Backend, text: str) -> None:
    tokenizer = loaded(model="gpt2", pre="gpt-2", **bpe_vocabulary(tiny_model))
    assert tokenizer.encode(text) == original.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_smollm_ids_are_the_original_ones(tiny_model: Path, original: Backend, text: str) -> None:
    """SmolLM's tokenizer.json cuts digits off one by one before the byte level; so does this oracle."""
    original = Backend.from_str(original.to_str())
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer = loaded(model="gpt2", pre="smollm", **bpe_vocabulary(tiny_model))
    assert tokenizer.encode(text) == original.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LLAMA3, inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default),
        (QWEN2, QWEN2_IN_TRANSFORMERS),
    ],
    ids=["llama3", "qwen2"],
)
def test_words_are_cut_as_in_transformers(ours: str, theirs: str) -> None:
    def cut(pattern: str, text: str) -> list[str]:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return [word for word, _ in split.pre_tokenize_str(text)]

    alphabet = "ab 'sSt\n\r\t.,!12½日é_"
    for seed in range(300):
        text = "".join(random.Random(seed).choices(alphabet, k=40))
        assert cut(ours, text) == cut(theirs, text)


def test_llama3_puts_its_bos_before_a_text(tiny_model: Path) -> None:
    fields = bpe_vocabulary(tiny_model) | {"model": "gpt2", "bos_token_id": 1}
    assert loaded(pre="llama-bpe", **fields).encode("newt")[0] == 1
    assert loaded(pre="llama-bpe", add_bos_token=False, **fields).encode("newt")[0] != 1
    assert loaded(pre="llama-bpe", **fields).encode("newt", add_special_tokens=False)[0] != 1
    assert loaded(pre="qwen2", **fields).encode("newt")[0] != 1


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe"])
def test_a_prompt_does_not_end_with_an_eos(tiny_model: Path, pre: str) -> None:
    """Whatever `add_eos_token` says, as from a directory whose tokenizer_config.json says it."""
    fields = bpe_vocabulary(tiny_model) | {"model": "gpt2", "pre": pre, "bos_token_id": 1, "eos_token_id": 2}
    plain = loaded(add_bos_token=True, **fields).encode("newt")
    assert plain[0] == 1
    for flag in (True, False):
        assert loaded(add_bos_token=True, add_eos_token=flag, **fields).encode("newt") == plain
    assert loaded(add_bos_token=False, add_eos_token=True, **fields).encode("newt") == plain[1:]


@pytest.mark.parametrize("role", ["padding", "unknown", "eot", "eom"])
@pytest.mark.parametrize("id", [512, 2**31 - 1])
def test_an_id_without_a_token_that_nothing_needs_is_left_out(tiny_model: Path, role: str, id: int) -> None:
    fields = bpe_vocabulary(tiny_model) | {"model": "gpt2", "pre": "gpt-2", "eos_token_id": 2}
    with capture_logs() as logs:
        tokenizer = loaded(**fields, **{f"{role}_token_id": id})
    assert (tokenizer.encode("newt"), tokenizer.eos_ids) == (loaded(**fields).encode("newt"), (2,))
    assert [line["key"] for line in logs] == [f"tokenizer.ggml.{role}_token_id"]


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_an_id_without_a_token_that_is_needed_is_refused(tiny_model: Path, role: str) -> None:
    with pytest.raises(ModelLoadError, match=rf"{role}_token_id is 512, and there are 512 tokens"):
        loaded(model="gpt2", pre="gpt-2", **bpe_vocabulary(tiny_model), **{f"{role}_token_id": 512})


def test_llama3_takes_whole_words_of_the_vocabulary_without_merges(tiny_model: Path) -> None:
    """`ignore_merges`: a word that is a token is that token, even where its merges would not lead there."""
    fields = bpe_vocabulary(tiny_model)
    fields["tokens"][100], fields["token_type"][100] = "zyx", 1
    assert loaded(model="gpt2", pre="llama-bpe", **fields).encode("zyx") == [100]
    assert loaded(model="gpt2", pre="qwen2", **fields).encode("zyx") != [100]


def test_qwen2_composes_characters(tiny_model: Path) -> None:
    tokenizer = loaded(model="gpt2", pre="qwen2", **bpe_vocabulary(tiny_model))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_kinds_of_token(tiny_model: Path) -> None:
    """Control tokens are special, user-defined ones are matched as a whole but printed, unused ones never."""
    fields = bpe_vocabulary(tiny_model)
    for id, text, kind in [(509, "<tool>", 4), (510, "<ctl>", 3), (511, "<unused>", 5)]:
        fields["tokens"][id], fields["token_type"][id] = text, kind
    fields["merges"] = [merge for merge in fields["merges"] if merge.replace(" ", "") in fields["tokens"]]
    tokenizer = loaded(model="gpt2", pre="gpt-2", **fields)
    assert tokenizer.encode("<tool>") == [509]
    assert tokenizer.encode("<ctl>") == [510]
    assert 511 not in tokenizer.encode("<unused>")
    assert tokenizer.decode([509, 510]) == "<tool>"
    assert tokenizer.decode([509, 510], skip_special_tokens=False) == "<tool><ctl>"
    assert tokenizer.vocab_size == 512


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "eom"])
def test_a_user_defined_token_with_a_role_is_special(tiny_model: Path, role: str) -> None:
    """Clients cannot write it."""
    fields = bpe_vocabulary(tiny_model) | {"model": "gpt2", "pre": "gpt-2"}
    fields["tokens"][511], fields["token_type"][511] = "<end>", 4
    fields["merges"] = [merge for merge in fields["merges"] if merge.replace(" ", "") in fields["tokens"]]
    assert loaded(**fields).decode([511]) == "<end>"
    assert loaded(**fields, **{f"{role}_token_id": 511}).decode([511]) == ""


def test_ids_that_end_generation(tiny_model: Path) -> None:
    fields = bpe_vocabulary(tiny_model) | {"model": "gpt2", "pre": "gpt-2"}
    assert loaded(eos_token_id=2, eot_token_id=0, eom_token_id=2, **fields).eos_ids == (2, 0)
    assert loaded(**fields).eos_ids == ()


# --- sentencepiece ---------------------------------------------------------------------------------------

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def pieces() -> dict[str, Any]:
    """A vocabulary as sentencepiece makes it: specials, bytes, then pieces by score, characters last."""
    words = [word for line in CORPUS.splitlines() for word in ("▁" + line.replace(" ", " ▁")).split(" ")]
    counts: dict[str, int] = {}
    for word in words:
        for start in range(len(word)):
            for end in range(start + 2, len(word) + 1):
                counts[word[start:end]] = counts.get(word[start:end], 0) + 1
    several = sorted((piece for piece in counts if counts[piece] > 1), key=lambda p: (-counts[p], len(p), p))
    characters = sorted(set("".join(words)))
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *several[:700], *characters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


PIECES = pieces()
SENTENCEPIECE = loaded(**PIECES)


def sentencepiece_encode(text: str) -> list[int]:
    """Sentencepiece's BPE encoder, plainly: join the two neighbours whose piece has the best score, the
    leftmost of equals, until none can be joined. Unknown characters become bytes. (bpe_model.cc)"""
    ids = {piece: id for id, piece in enumerate(PIECES["tokens"])}
    score = {piece: PIECES["scores"][id] for piece, id in ids.items() if PIECES["token_type"][id] == 1}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in score]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    encoded = []
    for symbol in symbols:
        encoded += [ids[symbol]] if symbol in score else [3 + byte for byte in symbol.encode()]
    return encoded


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.text(alphabet="the newt crosse road.,", min_size=1), st.text(min_size=1)))
def test_sentencepiece_ids_are_what_the_algorithm_gives(text: str) -> None:
    assert SENTENCEPIECE.encode(text, add_special_tokens=False) == sentencepiece_encode(text)


@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.text().filter(lambda text: "▁" not in text))
def test_sentencepiece_text_comes_back(text: str) -> None:
    ids = SENTENCEPIECE.encode(text)
    assert ids[0] == 1
    assert SENTENCEPIECE.decode(ids) == text


def test_sentencepiece_without_a_space_in_front() -> None:
    tokenizer = loaded(**PIECES, add_space_prefix=False)
    assert tokenizer.decode(tokenizer.encode(" newt")) == " newt"
    assert tokenizer.encode("newt") != SENTENCEPIECE.encode("newt")
    assert tokenizer.encode(" newt") == SENTENCEPIECE.encode("newt")


def test_text_of_a_single_piece_keeps_its_space() -> None:
    id = SENTENCEPIECE.token_id("▁the")
    assert id is not None
    assert SENTENCEPIECE.token_text(id) == " the"


def test_merges_are_ranked_by_score() -> None:
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -1.0, "bc": -2.0, "abc": -3.0}
    assert merges_of_pieces(scores) == [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]


def test_words_of_other_vocabularies_are_cut_as_in_transformers() -> None:
    """Its own table of what `tokenizer.ggml.pre` means, where this release has one."""
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    shared = {name: (pattern,) for name, pattern in theirs.items() if name in WORDS}
    assert {"tekken", "gpt-4o", "dbrx", "smaug-bpe"} <= shared.keys()
    assert {name: WORDS[name] for name in shared} == shared


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("tekken", "HelloWorld 123", ["Hello", "World", " ", "1", "2", "3"]),
        ("gpt-4o", "HelloWorld's 1234", ["Hello", "World's", " ", "123", "4"]),
        ("falcon", "a+=b 12345", ["a", "+=", "b", " ", "123", "45"]),
        ("refact", "a 12", ["a", " ", "1", "2"]),
        ("stablelm2", "it's 12", ["it", "'s", " ", "1", "2"]),
    ],
)
def test_words(pre: str, text: str, words: list[str]) -> None:
    assert [word.replace("Ġ", " ") for word, _ in _pre_tokenizer(pre, False).pre_tokenize_str(text)] == words


@pytest.mark.parametrize("pre", SUPPORTED)
def test_every_kind_gives_the_text_back(tiny_model: Path, pre: str) -> None:
    tokenizer = loaded(model="gpt2", pre=pre, add_bos_token=False, **bpe_vocabulary(tiny_model))
    for text in TEXTS[:2]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
