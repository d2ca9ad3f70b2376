"""Chat templates against transformers' own renderer."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.chat_template import ChatTemplate, ChatTemplateError
from runtime.errors import InvalidRequest
from tests.tiny import CHAT_TEMPLATE

CHAT = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": 'How many <legs> & "arms"?\n'},
    {"role": "assistant", "content": "Eight – ünï 😀 "},
]
TOOLS = [{"type": "function", "function": {"name": "über", "parameters": {"b": [1, 2.5, None], "a": "<x>"}}}]

# Between them these use every convention: whitespace trimming, tojson with and without options, loop
# controls, generation blocks, namespaces, `is defined`, bos_token, and message parts.
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "trimming": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n"
        "U: {{ m.content | trim }}\n    {% endif %}\n{% endfor %}\n"
    ),
    "tools": "{{ bos_token }}{% if tools is not none %}{{ tools | tojson }}|{{ tools | tojson(indent=2) }}{% endif %}",
    "loops": (
        "{% for m in messages %}{% if loop.index0 == 0 %}{% continue %}{% endif %}"
        "{{ m.content }}{% break %}{% endfor %}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "defined": (
        "{% for m in messages %}{% if m.name is defined %}{{ m.name }}{% endif %}{{ documents is none }}{% endfor %}"
    ),
    "prompt": "{% if add_generation_prompt %}go{{ extra }}{% endif %}",
}


def ours(source: str, messages: list[Any] = CHAT, *, prompt: bool = False, **options: Any) -> str:
    variables = options.pop("variables", {})
    return ChatTemplate(source).render(messages, add_generation_prompt=prompt, variables=variables, **options)


def theirs(source: str, messages: list[Any], **options: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=source, **options)
    return str(rendered[0])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_renders_as_transformers_does(name: str, prompt: bool) -> None:
    source, variables = TEMPLATES[name], {"bos_token": "<s>", "extra": "!"}
    assert ours(source, prompt=prompt, tools=TOOLS, variables=variables) == theirs(
        source, CHAT, tools=TOOLS, add_generation_prompt=prompt, **variables
    )


@pytest.mark.parametrize("name", ["chatml", "generation"])
@pytest.mark.parametrize("content", ["Eight", "Eight ", " Eight\n\n", ""])
def test_continues_the_last_message_as_transformers_does(name: str, content: str) -> None:
    messages = [*CHAT[:2], {"role": "assistant", "content": content}]
    expected = theirs(TEMPLATES[name], messages, continue_final_message=True)
    assert ours(TEMPLATES[name], messages, continue_final_message=True) == expected
    assert expected.endswith(content)


def test_continues_a_message_that_the_template_strips() -> None:
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    messages = [{"role": "assistant", "content": "Eight legs  "}]
    expected = theirs(source, messages, continue_final_message=True)
    assert ours(source, messages, continue_final_message=True) == expected == "[Eight legs"


def test_continues_a_message_made_of_parts() -> None:
    source = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "Eight"}, {"text": " le"}]}]
    assert ours(source, messages, continue_final_message=True) == "Eight le"
    assert messages[0]["content"][1]["text"] == " le"  # the caller's messages are left alone


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (CHAT, {"continue_final_message": True, "prompt": True}, "exclude each other"),
        ([{"role": "user"}], {"continue_final_message": True}, "no text to continue"),
        ([], {}, "must not be empty"),
    ],
)
def test_chats_that_make_no_sense(messages: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ours(CHAT_TEMPLATE, messages, **options)


def test_a_template_that_leaves_the_last_message_out_cannot_continue_it() -> None:
    with pytest.raises(InvalidRequest, match="leaves out the last message"):
        ours("{{ messages[0].content }}", continue_final_message=True)


def test_null_is_the_same_as_absent() -> None:
    messages = [{"role": "user", "content": "x", "name": None}]
    assert ours(TEMPLATES["defined"], messages) == "True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "refused the messages: Roles must alternate"),
        ("{{ 'a' + messages[0].absent }}", "refused the messages: .*absent"),
        ("{{ 'a' + 1 }}", "cannot render these messages"),
        ("{{ messages[0].content.format_map }}{{ messages[0]['content'] / 2 }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "refused the messages"),
        ("{{ messages.append(1) }}", "refused the messages"),
        ("{{ range(10 ** 9) | list }}", "cannot render these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render these messages"),
    ],
)
def test_what_a_template_raises_is_the_requests_fault(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        ours(source)
    assert caught.value.param == "messages"


def test_a_broken_template_is_found_at_once() -> None:
    with pytest.raises(ChatTemplateError, match="line 3"):
        ChatTemplate("{# fine #}\n\n{% for m in messages %}{{ m }")


def test_the_date() -> None:
    assert len(ours("{{ strftime_now('%Y-%m-%d') }}")) == 10
