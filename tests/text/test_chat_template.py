"""Chat templates against transformers' own renderer."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.errors import InvalidRequest
from runtime.text.chat_template import ChatTemplate, ChatTemplateError
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
        ("{{ cycler().next() }}", "cannot render these messages: at least one item"),
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


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


WALK = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
EACH = "{% for m in messages %}[{{ m.role }}]"
WALKING = {
    "a loop": EACH + WALK + "{% endfor %}",
    "by item": EACH + "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
    "through a variable": EACH + "{% set c = m.content %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
    "through a filter": (
        EACH + "{% for p in m.content | selectattr('type', 'eq', 'text') %}{{ p.text }}{% endfor %}{% endfor %}"
    ),
    "mapped and joined": EACH + "{{ m.content | map(attribute='text') | join('') }}{% endfor %}",
    "in a macro": (
        "{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
        + EACH
        + "{{ show(m.content) }}{% endfor %}"
    ),
    "the first part": EACH + "{{ m.content[0].text }}{% endfor %}",
    "in capitals": EACH + "{% for p in m.content %}{{ p.text | upper }}{% endfor %}{% endfor %}",
}
PRINTING = {
    "printed": EACH + "{{ m.content }}{% endfor %}",
    "added": EACH + "{{ '<' + m.content + '>' }}{% endfor %}",
    "trimmed": EACH + "{{ m['content'] | trim }}{% endfor %}",
    "as JSON": EACH + "{{ m.content | tojson }}{% endfor %}",
    "by characters": EACH + "{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
    "chatml": CHAT_TEMPLATE,
}
EITHER = {
    "either": EACH + "{% if m.content is string %}{{ m.content }}{% else %}" + WALK + "{% endif %}{% endfor %}",
    "either, each otherwise": (
        EACH + "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}- {{ p.text }}\n{% endfor %}{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("source", WALKING.values(), ids=WALKING)
def test_a_template_that_walks_parts_gets_parts(source: str) -> None:
    one, two = part("SEC"), part("RET")
    for content, expected in (("SECRET", [part("SECRET")]), ([one], [one]), ([one, two], [one, two])):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        assert ours(source, messages) == theirs(source, [{**message, "content": expected} for message in messages])


@pytest.mark.parametrize("source", PRINTING.values(), ids=PRINTING)
def test_a_template_that_prints_a_string_gets_a_string(source: str) -> None:
    one, two = part("SEC"), part("RET")
    for content, expected in (("SECRET", "SECRET"), ([part("SECRET")], "SECRET"), ([one, two], "SEC\nRET")):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        assert ours(source, messages) == theirs(source, [{**message, "content": expected} for message in messages])


@pytest.mark.parametrize("source", EITHER.values(), ids=EITHER)
@pytest.mark.parametrize(
    "content", ["SECRET", [part("SECRET")], [part("SEC"), part("RET")], [part("a"), {"type": "image"}]]
)
def test_a_template_that_takes_either_gets_what_was_sent(source: str, content: Any) -> None:
    messages = [{"role": "user", "content": content}]
    assert ours(source, messages) == theirs(source, messages)


def test_each_role_is_given_what_the_template_does_with_it() -> None:
    """The system prompt is printed, then come messages that are walked; the template takes no two of a role."""
    source = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}"
        "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        "{% endif %}[{{ m.role }}]" + WALK + "{% endfor %}"
    )
    for wrap in (str, lambda text: [part(text)]):
        messages = [{"role": role, "content": wrap(role.upper())} for role in ("system", "user", "assistant")]
        assert ours(source, messages) == "SYSTEM[user]USER[assistant]ASSISTANT"


def test_a_tool_result_is_given_as_the_template_takes_it() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% for p in m.content %}<{{ p.text }}>{% endfor %}"
        "{% elif m.tool_calls is defined %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    messages = [
        {"role": "user", "content": [part("U")]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]},
        {"role": "tool", "content": "T"},
    ]
    assert ours(source, messages) == "Ulook<T>"


def test_a_string_is_continued_in_a_template_that_walks_parts() -> None:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Eight le"}]
    assert ours(WALKING["a loop"], messages, continue_final_message=True) == "[user]Q[assistant]Eight le"


def test_a_template_that_refuses_everything_is_left_alone() -> None:
    with pytest.raises(InvalidRequest, match="no chats today"):
        ours("{{ raise_exception('no chats today') }}")
