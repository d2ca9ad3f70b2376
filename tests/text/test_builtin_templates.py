"""The built-in chat templates against what the models of their names write.

The expected prompts were written down from the published formats: Meta's for Llama 2 and 3, Mistral's v3, Google's for
Gemma, Microsoft's for Phi-3, Qwen's, FastChat's for Vicuna, Stanford's for Alpaca, and the model card of Zephyr.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.checkpoints import ModelLoadError, open_checkpoint
from runtime.errors import InvalidRequest
from runtime.text import chat_template
from runtime.text.chat_template import ChatTemplate
from runtime.text.templates import BUILTIN_TEMPLATES, builtin_template
from runtime.text.turn_end import turn_end
from runtime.trainer.data.instructions import ALPACA

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ASKED = [{"role": "user", "content": "Hello"}]
CHAT = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
]
CHATML = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
CHATML_CHAT = (
    "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
COHERE = "<s><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hello<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
_SYSTEM = "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief<|END_OF_TURN_TOKEN|>"
_LAST = "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Who are you<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
COHERE_CHAT = _SYSTEM + COHERE.removeprefix("<s>") + "Hi there<|END_OF_TURN_TOKEN|>" + _LAST
COMMAND_CHAT = (
    _SYSTEM
    + COHERE.removeprefix("<s>")
    + "<|START_RESPONSE|>Hi there<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    + _LAST
    + "<|START_RESPONSE|>"
)
# Name → the prompt of ASKED, and that of CHAT.
EXPECTED = {
    "alpaca": (
        f"<s>{INSTRUCTION}\n\n### Instruction:\nHello\n\n### Response:\n",
        "<s>Be brief\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>\n\n### Instruction:\nWho are you"
        "\n\n### Response:\n",
    ),
    "chatml": (CHATML, CHATML_CHAT),
    "aya": (COHERE, COHERE_CHAT),
    "cohere": (COHERE, COHERE_CHAT),
    "command_a": (COHERE + "<|START_RESPONSE|>", COMMAND_CHAT),
    "deepseek_v2": (
        "<s><｜User｜>Hello<｜Assistant｜>",
        "<s>Be brief\n\n<｜User｜>Hello<｜Assistant｜>Hi there</s><｜User｜>Who are you<｜Assistant｜>",
    ),
    "deepseek_v3": (
        "<s><｜User｜>Hello<｜Assistant｜>",
        "<s>Be brief<｜User｜>Hello<｜Assistant｜>Hi there</s><｜User｜>Who are you<｜Assistant｜>",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|]Hello\n[|assistant|]",
        "[|system|]Be brief[|endofturn|]\n[|user|]Hello\n[|assistant|]Hi there[|endofturn|]\n[|user|]Who are you\n"
        "[|assistant|]",
    ),
    "exaone4": (
        "[|user|]\nHello[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n",
        "[|system|]\nBe brief[|endofturn|]\n[|user|]\nHello[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\nHi "
        "there[|endofturn|]\n[|user|]\nWho are you[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n",
    ),
    "falcon_h1": (f"<s>{CHATML}", f"<s>{CHATML_CHAT}"),
    "gemma4": (
        "<s><|turn>user\nHello<turn|>\n<|turn>model\n",
        "<s><|turn>system\nBe brief<turn|>\n<|turn>user\nHello<turn|>\n<|turn>model\nHi there<turn|>\n"
        "<|turn>user\nWho are you<turn|>\n<|turn>model\n",
    ),
    "jamba": (
        "<s><|bom|><|system|> <|eom|><|bom|><|user|> Hello<|eom|><|bom|><|assistant|>",
        "<s><|bom|><|system|> Be brief<|eom|><|bom|><|user|> Hello<|eom|><|bom|><|assistant|> Hi there<|eom|>"
        "<|bom|><|user|> Who are you<|eom|><|bom|><|assistant|>",
    ),
    "llama4": (
        "<s><|header_start|>user<|header_end|>\n\nHello<|eot|><|header_start|>assistant<|header_end|>\n\n",
        "<s><|header_start|>system<|header_end|>\n\nBe brief<|eot|><|header_start|>user<|header_end|>\n\nHello<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nHi there<|eot|><|header_start|>user<|header_end|>\n\nWho are you"
        "<|eot|><|header_start|>assistant<|header_end|>\n\n",
    ),
    "metharme": (
        "<s><|user|>Hello<|model|>",
        "<s><|system|>Be brief<|user|>Hello<|model|>Hi there</s><|user|>Who are you<|model|>",
    ),
    "mistral_v1": (
        "<s> [INST] Hello [/INST]",
        "<s> [INST] Be brief\n\nHello [/INST] Hi there</s> [INST] Who are you [/INST]",
    ),
    "mistral_v3_tekken": (
        "<s>[INST]Hello[/INST]",
        "<s>[INST]Hello[/INST]Hi there</s>[INST]Be brief\n\nWho are you[/INST]",
    ),
    "mistral_v7_tekken": (
        "<s>[INST]Hello[/INST]",
        "<s>[SYSTEM_PROMPT]Be brief[/SYSTEM_PROMPT][INST]Hello[/INST]Hi there</s>[INST]Who are you[/INST]",
    ),
    "phi_4": (
        "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_start|>system<|im_sep|>Be brief<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Hi there<|im_end|><|im_start|>user<|im_sep|>Who are you<|im_end|>"
        "<|im_start|>assistant<|im_sep|>",
    ),
    "qwen3": (CHATML, CHATML_CHAT),
    "gemma": (
        "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n",
        "<s><start_of_turn>user\nBe brief\n\nHello<end_of_turn>\n<start_of_turn>model\nHi there<end_of_turn>\n"
        "<start_of_turn>user\nWho are you<end_of_turn>\n<start_of_turn>model\n",
    ),
    "llama2": (
        "<s>[INST] Hello [/INST]",
        "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHello [/INST] Hi there </s><s>[INST] Who are you [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho are you<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "mistral": (
        "<s>[INST] Hello[/INST]",
        "<s>[INST] Hello[/INST] Hi there</s>[INST] Be brief\n\nWho are you[/INST]",
    ),
    "phi3": (
        "<|user|>\nHello<|end|>\n<|assistant|>\n",
        "<|system|>\nBe brief<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi there<|end|>\n"
        "<|user|>\nWho are you<|end|>\n<|assistant|>\n",
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n" + CHATML,
        CHATML_CHAT,
    ),
    "vicuna": (
        f"<s>{CURIOUS} USER: Hello ASSISTANT:",
        "<s>Be brief USER: Hello ASSISTANT: Hi there</s>USER: Who are you ASSISTANT:",
    ),
    "zephyr": (
        "<|user|>\nHello</s>\n<|assistant|>\n",
        "<|system|>\nBe brief</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n<|user|>\nWho are you</s>\n"
        "<|assistant|>\n",
    ),
}
ENDS = {
    "aya": "<|END_OF_TURN_TOKEN|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "command_a": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek_v2": "</s>",
    "deepseek_v3": "</s>",
    "exaone": "[|endofturn|]\n",
    "exaone4": "[|endofturn|]\n",
    "falcon_h1": "<|im_end|>\n",
    "gemma4": "<turn|>\n",
    "jamba": "<|eom|>",
    "llama4": "<|eot|>",
    "metharme": "</s>",
    "mistral_v1": "</s>",
    "mistral_v3_tekken": "</s>",
    "mistral_v7_tekken": "</s>",
    "phi_4": "<|im_end|>",
    "qwen3": "<|im_end|>\n",
    "alpaca": "</s>",
    "chatml": "<|im_end|>\n",
    "gemma": "<end_of_turn>\n",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "phi3": "<|end|>\n",
    "qwen2.5": "<|im_end|>\n",
    "vicuna": "</s>",
    "zephyr": "</s>\n",
}
"""Text after an answer that ends a chat."""

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CALLED = [
    {"role": "user", "content": "Look"},
    {
        "role": "assistant",
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "a"}}},
            {"id": "call00002", "type": "function", "function": {"name": "look", "arguments": '{"at": "b"}'}},
        ],
    },
    {"role": "tool", "content": "1", "tool_call_id": "call00001"},
    {"role": "tool", "content": "2", "tool_call_id": "call00002"},
]
SHOWN_TOOL = '{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}'


def source_of(name: str) -> str:
    source = builtin_template(name)
    assert source is not None
    return source


def render(name: str, chat: list[Any], *, prompt: bool = True, **options: Any) -> str:
    template = ChatTemplate(source_of(name), SPECIAL)
    return template.render(chat, add_generation_prompt=prompt, variables={}, **options)


def test_every_file_is_listed_and_every_name_has_a_test() -> None:
    folder = Path(chat_template.__file__).parent / "templates"
    assert {path.stem for path in folder.glob("*.jinja")} == set(BUILTIN_TEMPLATES) == EXPECTED.keys() == ENDS.keys()
    assert builtin_template("../templates/chatml") is None


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_prompts_are_those_of_the_models(name: str) -> None:
    asked, chat = EXPECTED[name]
    assert render(name, ASKED) == asked
    assert render(name, CHAT) == chat


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_transformers_renders_them_alike(name: str) -> None:
    theirs, _ = render_jinja_template([CHAT], chat_template=source_of(name), add_generation_prompt=True, **SPECIAL)
    assert theirs[0] == render(name, CHAT)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_an_answer_ends_as_it_does_in_training(name: str) -> None:
    answered = [*ASKED, {"role": "assistant", "content": "Hi"}]
    whole = render(name, answered, prompt=False)
    assert whole.endswith("Hi" + ENDS[name])
    # What training relies on: the prompt is the beginning of the chat that holds its answer.
    assert whole.startswith(render(name, ASKED))


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_parts_and_missing_special_tokens(name: str) -> None:
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in CHAT]
    assert render(name, in_parts) == EXPECTED[name][1]
    bare = ChatTemplate(source_of(name)).render(CHAT, add_generation_prompt=True, variables={})
    assert bare == re.sub("</?s>", "", EXPECTED[name][1])


@pytest.mark.parametrize("name", ["gemma", "llama2", "mistral", "mistral_v1", "mistral_v3_tekken", "mistral_v7_tekken"])
def test_models_that_know_turns_only_refuse_others(name: str) -> None:
    with pytest.raises(InvalidRequest, match="must take turns"):
        render(name, [*ASKED, *ASKED])


@pytest.mark.parametrize("name", ["alpaca", "gemma", "llama2", "mistral", "vicuna"])
def test_no_message_is_left_out(name: str) -> None:
    with pytest.raises(InvalidRequest, match="refused the messages"):
        render(name, [*ASKED, {"role": "system", "content": "late"}])


def test_alpaca_is_the_prompt_of_its_datasets() -> None:
    assert render("alpaca", ASKED) == "<s>" + ALPACA.without.format(instruction="Hello")


def test_qwen_calls_tools() -> None:
    text = render("qwen2.5", CALLED, tools=TOOLS)
    head, _, rest = text.partition("<|im_end|>\n")
    assert f"<tools>\n{SHOWN_TOOL}\n</tools>" in head
    assert rest == (
        "<|im_start|>user\nLook<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "a"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "look", "arguments": {"at": "b"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_mistral_calls_tools() -> None:
    assert render("mistral", CALLED, tools=TOOLS) == (
        f"<s>[AVAILABLE_TOOLS] [{SHOWN_TOOL}][/AVAILABLE_TOOLS][INST] Look[/INST]"
        '[TOOL_CALLS] [{"name": "look", "arguments": {"at": "a"}, "id": "call00001"}, '
        '{"name": "look", "arguments": {"at": "b"}, "id": "call00002"}]</s>'
        '[TOOL_RESULTS] {"content": 1, "call_id": "call00001"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": 2, "call_id": "call00002"}[/TOOL_RESULTS]'
    )
    with pytest.raises(InvalidRequest, match="9 letters and digits"):
        render("mistral", [*CALLED[:2], {"role": "tool", "content": "1", "tool_call_id": "x"}], tools=TOOLS)


def test_a_model_is_opened_with_a_built_in_template(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = open_checkpoint(str(tiny_model), chat_template="chatml").tokenizer
    assert tokenizer.render_chat(CHAT) == CHATML_CHAT
    assert tokenizer.chat_template == builtin_template("chatml")
    assert turn_end(tokenizer).token_id == tokenizer.token_id("<|im_end|>")
    with pytest.raises(ModelLoadError, match=r"chatmel.*one of the built-in alpaca, aya, chatml, .*zephyr"):
        open_checkpoint(str(tiny_model), chat_template="chatmel")


AXOLOTL = """alpaca aya chatml cohere command_a deepseek_v2 deepseek_v3 exaone exaone4 falcon_h1 gemma gemma3 gemma3n
    jamba llama3 llama4 metharme mistral_v1 mistral_v2v3 mistral_v3_tekken mistral_v7_tekken nemotron_h phi_3 phi_35
    phi_4 qwen_25 qwen3"""


@pytest.mark.parametrize("name", AXOLOTL.split())
def test_axolotls_names_are_known(name: str) -> None:
    assert builtin_template(name) is not None


def test_qwen3_shows_reasoning_after_the_last_question_only() -> None:
    thought = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm."}
    assert render("qwen3", [*ASKED, thought], prompt=False).endswith(
        "assistant\n<think>\nHm.\n</think>\n\nHi<|im_end|>\n"
    )
    earlier = render("qwen3", [*ASKED, thought, *ASKED])
    assert "Hm." not in earlier
    assert "assistant\nHi<|im_end|>" in earlier
    off = ChatTemplate(source_of("qwen3")).render(
        ASKED, add_generation_prompt=True, variables={"enable_thinking": False}
    )
    assert off.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_qwen3_calls_tools() -> None:
    text = render("qwen3", CALLED, tools=TOOLS)
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\n# Tools\n\n")
    assert f"<tools>\n{SHOWN_TOOL}\n</tools>" in head
    assert rest == (
        "<|im_start|>user\nLook<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "a"}}\n</tool_call>'
        '\n<tool_call>\n{"name": "look", "arguments": {"at": "b"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_another_template_of_the_same_tokenizer(tiny_model: Path) -> None:
    """With the ends of turns that it writes; the tokenizer itself stays as it is."""
    tokenizer = open_checkpoint(str(tiny_model)).tokenizer
    bare = tokenizer.with_template("{% for m in messages %}{{ m.content }}?{% endfor %}")
    assert (bare.render_chat(ASKED), bare.chat_template) == (
        "Hello?",
        "{% for m in messages %}{{ m.content }}?{% endfor %}",
    )
    chatml = bare.with_template(source_of("chatml"))
    assert chatml.eos_ids == tokenizer.eos_ids
    assert chatml.encode_chat(CHAT) == tokenizer.encode_chat(CHAT)
    assert tokenizer.with_template(source_of("chatml")) is chatml
    assert tokenizer.render_chat(ASKED) != "Hello?"
