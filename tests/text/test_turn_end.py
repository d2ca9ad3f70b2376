"""Ends of answers: templates and vocabularies that belong together, and those that do not."""

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from runtime.text.tokenizer import Tokenizer
from runtime.text.turn_end import turn_end
from tests.tiny import CHAT_TEMPLATE

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
LOOP = "{% for m in messages %}{{ m.role }}: {{ m.content }}END\n{% endfor %}"
PARTS = "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part.text }}{% endfor %}</s>\n{% endfor %}"
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('where?') }}{% endif %}" + CHAT_TEMPLATE


def make(template: str | None, *specials: str, eos: tuple[str, ...] = (), bos: bool = False) -> Tokenizer:
    """A tokenizer of bytes and these special tokens; `bos`: `<s>` comes before texts."""
    backend = Backend(models.BPE(vocab={char: id for id, char in enumerate(ALPHABET)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", *specials)])
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    ids = [id for text in eos if (id := backend.token_to_id(text)) is not None]
    names = {"bos_token": "<s>"}
    return Tokenizer(backend, bos_id=256, eos_ids=ids, chat_template=template, template_tokens=names)


def test_an_end_that_is_one_token_and_ends_generation_is_fine() -> None:
    tokenizer = make(CHAT_TEMPLATE, "<|im_start|>", "<|im_end|>", "<|endoftext|>", eos=("<|endoftext|>",))
    end = tokenizer.turn_end
    assert (end.text, end.token_id, end.problems) == ("<|im_end|>\n", tokenizer.token_id("<|im_end|>"), ())
    assert tokenizer.eos_ids == (tokenizer.token_id("<|endoftext|>"), end.token_id)


def test_a_base_model_with_chatml_is_named() -> None:
    tokenizer = make(CHAT_TEMPLATE, "<|endoftext|>", eos=("<|endoftext|>",))
    end = tokenizer.turn_end
    assert end.token_id is None
    (problem,) = end.problems
    assert "'<|im_end|>', which is 10 tokens" in problem
    assert "'<|endoftext|>'" in problem


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }}\n{% endfor %}", LOOP])
def test_an_end_of_plain_text_is_named(template: str) -> None:
    tokenizer = make(template, "</s>", eos=("</s>",))
    assert tokenizer.turn_end.token_id is None
    assert len(tokenizer.turn_end.problems) == 1


def test_a_special_end_that_no_configuration_names_ends_generation() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|fin|>\n{% endfor %}"
    tokenizer = make(template, "<|fin|>", "</s>", eos=("</s>",))
    assert tokenizer.eos_ids == (tokenizer.token_id("</s>"), tokenizer.token_id("<|fin|>"))
    assert tokenizer.turn_end.token_id == tokenizer.token_id("<|fin|>")
    assert not tokenizer.turn_end.problems


def test_a_special_token_before_the_one_that_ends_generation_stays_part_of_the_answer() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|response|></s>\n{% endfor %}"
    tokenizer = make(template, "<|response|>", "</s>", eos=("</s>",))
    assert tokenizer.eos_ids == (tokenizer.token_id("</s>"),)
    assert tokenizer.turn_end.token_id == tokenizer.eos_ids[0]


def test_the_next_question_can_end_an_answer() -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    tokenizer = make(template, "<|user|>", "<|assistant|>", eos=("<|user|>",))
    assert tokenizer.turn_end.token_id == tokenizer.token_id("<|user|>")
    assert not tokenizer.turn_end.problems


@pytest.mark.parametrize("template", [PARTS, NEEDS_SYSTEM])
def test_templates_that_want_parts_or_a_system_message(template: str) -> None:
    tokenizer = make(template, "<|im_start|>", "<|im_end|>", "</s>", eos=("</s>", "<|im_end|>"))
    assert tokenizer.turn_end.token_id in tokenizer.eos_ids
    assert not tokenizer.turn_end.problems


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ messages[0].content }}"])
def test_a_template_that_cannot_be_probed_is_named(template: str) -> None:
    tokenizer = make(template, "</s>", eos=("</s>",))
    assert tokenizer.turn_end.token_id is None
    assert "cannot be told" in tokenizer.turn_end.problems[0]


def test_without_a_template_an_end_of_texts_is_enough() -> None:
    assert not make(None, "</s>", eos=("</s>",)).turn_end.problems
    assert "no token that ends a text" in make(None, "</s>").turn_end.problems[0]


def test_a_missing_bos_is_named() -> None:
    specials = ("<|im_start|>", "<|im_end|>")
    assert not make(CHAT_TEMPLATE, *specials, eos=specials[1:]).turn_end.bos_missing
    assert not make("{{ bos_token }}" + CHAT_TEMPLATE, *specials, eos=specials[1:], bos=True).turn_end.bos_missing
    end = make(CHAT_TEMPLATE, *specials, eos=specials[1:], bos=True).turn_end
    assert end.bos_missing
    assert "'<s>'" in end.problems[0]


def test_a_recipe_can_name_further_ends() -> None:
    tokenizer = make(LOOP, "</s>", eos=("</s>",))
    newline = tokenizer.encode("\n")[0]
    assert turn_end(tokenizer, ends=[newline]).token_id == newline
