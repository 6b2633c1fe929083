"""Chat templates: as transformers renders them, and hostile ones."""

import sys
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vptq_runtime import FileError, OptionError, UnsupportedError
from vptq_runtime.text import chat_template as chat_module
from vptq_runtime.text.chat_template import ChatTemplate, Message, trimmed

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": " Grüße, 世界! \n"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
]

# In the style of the models': Llama 2 and Mistral, ChatML, Llama 3, and what else templates make use of.
TEMPLATES = {
    "inst": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content']
            if loop.first and system_message else message['content'] %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% else %}
        {{- ' ' + message['content'] | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "chatml": """{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}""",
    "dated": """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{{- date_string }}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{% endgeneration %}{% continue %}
    {%- endif %}
    {{- "<|header|>" ~ message['role'] ~ "<|end|>\n\n" ~ message['content'] | trim ~ "<|eot|>" }}
{%- endfor %}""",
    "json": """{% set ns = namespace(n=0) %}
    {% for message in messages %}
{% set ns.n = ns.n + message.content | length %}
{{ message | tojson }} {{ message | tojson(indent=2) }}
{%- if loop.index > 2 %}{% break %}{% endif %}
    {% endfor %}
{{ ns.n }} {{ unknown_variable }} {{ "%s of %03d" % ("a", 7) }}
{{ "ab" * 3 }} {{ "{:>4}".format(1) }} {{ 2 ** 10 }} {{ 1 ~ none ~ unknown_variable ~ [2] }}
{%- macro twice(x) %}{{ x }}{{ x | indent(2) }}{% endmacro %}
{{ twice(messages | map(attribute='role') | join(', ')) }}""",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders(name: str) -> None:
    ours = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS, "m.gguf").render(MESSAGES)
    theirs, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL_TOKENS
    )
    assert ours == theirs[0]
    assert "Grüße" in ours


def test_the_template_refuses_messages() -> None:
    template = ChatTemplate(TEMPLATES["inst"], SPECIAL_TOKENS, "m.gguf")
    with pytest.raises(OptionError, match="the model's chat template says: Roles must alternate"):
        template.render([MESSAGES[1], MESSAGES[1]])


def test_no_template() -> None:
    with pytest.raises(UnsupportedError, match=r"m\.gguf: the model has no chat template .* use generate"):
        ChatTemplate(None, {}, "m.gguf")


@pytest.mark.parametrize(
    "template",
    [
        5,
        "{% if %}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
        "{{ messages | no_such_filter }}",
        "{% include '/etc/passwd' %}",
        "{% for m in messages %}",
        "{{ messages + 1 }}",
        "{{ ().__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['sys'] }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
        "{% set x = 'a' %}" * 10_000,
    ],
    ids=lambda template: str(template)[:40],
)
def test_bad_templates(template: Any) -> None:
    with pytest.raises(FileError, match=r"^m\.gguf: tokenizer\.chat_template: .") as error:
        ChatTemplate(template, {}, "m.gguf").render(MESSAGES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [messages] }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' % (99999999999, 1) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a\nb' | indent(10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10000000000) }}",
        "{{ range(10000000000) | list }}",
        "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% set s = 'a' * 999 %}" + "{% set s = s ~ s %}" * 40,
        "{% set s = 'a' * 999 %}" + "{% set s = s + s %}" * 40,
        "{% set s = 'a' * 999 %}" + "{% set t %}{{ s }}{{ s }}{% endset %}{% set s = t %}" * 40,
        "{% set s = [messages] %}" + "{% set s = s + s %}" * 40,
        "{% set n = namespace(s='aa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{{ 'aaaaaaaa'" + " | replace('a', 'aaaaaaaa')" * 30 + " }}",
        "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{{ " + "m(" * 40 + "'a'" + ")" * 40 + " }}",
        # Lists in lists: what holds them is small, what walks through them never comes to an end.
        "{% set s = ['a'] %}" + "{% set s = [s, s] %}" * 40 + "{{ s }}",
        "{% set s = ['a'] %}" + "{% set s = (s, s) %}" * 40 + "{{ s | tojson }}",
        "{% set s = ['a'] %}" + "{% set s = {1: s, 2: s} %}" * 40 + "{{ s == s }}",
        "{% set s = namespace(a=1) %}" + "{% set s = namespace(a=s, b=s) %}" * 40 + "{{ s }}",
        # The limit on each value, many times.
        "{% for i in range(99999) %}{{ ('a' * 1000000) | length }}{% endfor %}",
        "{% set s = namespace(a=none) %}"
        "{% for i in range(99999) %}{% set s.a = [s.a, i ~ 'a' * 9999] %}{% endfor %}",
        "{{ range(99999) | map('string') | map('center', 999999) | list | length }}",
        "{{ range(99999) | map('string') | join('a' * 999999) }}",
        # As much again for each character.
        "{{ ('a' * 500000).replace('a', 'a' * 500000) }}",
        "{{ ('a' * 500000) | replace('a', 'a' * 500000) }}",
        "{{ ('a' * 500000).join('a' * 500000) }}",
        "{{ ('\\n' * 500000) | indent('a' * 500000) }}",
        "{{ ('\\t' * 500000).expandtabs(500000) }}",
        "{{ ('a' * 500000).translate({97: 'a' * 500000}) }}",
        "{{ ('{0:1000000}' * 1000).format(1) }}",
        "{{ '{:>{w}{w}{w}}'.format('a', w='999') }}",
        "{{ '%*d' % (1000000, 1) }}",
        "{{ 'a'.encode().ljust(10000000000) }}",
        "{{ 1 | round(-10000000) }}",
        "{{ [[1]] | tojson(indent=1000000000) }}",
        "{% set s = namespace(n=3) %}{% for i in range(40) %}{% set s.n = s.n * s.n %}{% endfor %}",
    ],
)
def test_exploding_templates(template: str) -> None:
    with pytest.raises(FileError, match=r"^m\.gguf: tokenizer\.chat_template: "):
        ChatTemplate(template, {}, "m.gguf").render(MESSAGES)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'At %d: %s' % (1700000000, 'a') }}", "At 1700000000: a"),
        ("{{ '**%s** {{%5.1f}}' | format('a', 2) }}", "**a** {{  2.0}}"),
        ("{{ 'On 20260101 {} {:>3}'.format('a', 2) }}", "On 20260101 a   2"),
        ("{{ [(1, 'a'), [2]] | tojson(indent=1) | replace('\\n', '') }}", '[ [  1,  "a" ], [  2 ]]'),
        ("{% for a, b in {1: 2}.items() %}{{ a }}{{ b }}{% endfor %}", "12"),
        ("{{ 1700000000 | string ~ none ~ [1] }}", "1700000000None[1]"),
    ],
)
def test_what_stays_allowed(template: str, text: str) -> None:
    assert ChatTemplate(template, {}, "m.gguf").render(MESSAGES) == text


ENDLESS = "{% for a in range(9999) %}" * 9 + "{% endfor %}" * 9


def test_endless_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "MAX_SECONDS", 0.1)
    trace = sys.gettrace()
    with pytest.raises(FileError, match=r"did not finish within 0\.1 seconds"):
        ChatTemplate(ENDLESS, {}, "m.gguf").render(MESSAGES)
    assert sys.gettrace() is trace


def test_a_long_chat_is_no_endless_one() -> None:
    messages = MESSAGES[:1] + MESSAGES[1:3] * 2000
    text = ChatTemplate(TEMPLATES["chatml"], {}, "m.gguf").render(messages)
    assert text.count("<|im_start|>") == 4002


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        None,
        {"role": "user", "content": "a"},
        ["hello"],
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": ["a"]}],
        [{"role": 1, "content": "a"}],
        pytest.param([{"role": "user", "content": "a" * (2**20 + 1)}], id="long"),
    ],
    ids=str,
)
def test_malformed_messages(messages: Any) -> None:
    with pytest.raises(OptionError, match=r"^messages"):
        ChatTemplate("x", {}, "m.gguf").render(messages)


def turns(roles: str) -> list[Message]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[role], "content": f"{role}{i}"} for i, role in enumerate(roles)]


def contents(messages: list[Message]) -> str:
    return " ".join(message["content"] for message in messages)


@pytest.mark.parametrize(
    ("roles", "most", "expected"),
    [
        ("suauau", 6, "s0 u1 a2 u3 a4 u5"),
        ("suauau", 5, "s0 u3 a4 u5"),
        ("suauau", 4, "s0 u3 a4 u5"),
        ("suauau", 3, "s0 u5"),
        ("suauau", 1, "s0 u5"),  # the rest stays, and is refused as too long
        ("uauau", 4, "u2 a3 u4"),
        ("uaauau", 5, "u3 a4 u5"),
        ("u", 0, "u0"),
    ],
)
def test_oldest_turns_go_first(roles: str, most: int, expected: str) -> None:
    messages = turns(roles)
    assert contents(trimmed(messages, len, most)) == expected
    assert contents(messages) == contents(turns(roles))  # untouched
