"""Jinja templates of checkpoints: what they write, what they are kept from, and one-line errors."""

import time

import pytest
from tiny_dialogues import dialogue

from llama_jax.errors import UserError
from llama_jax.text.chat import Message, Stops
from llama_jax.text.jinja_template import JinjaTemplate

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


def rendered(source, tokenizer, *turns):
    return JinjaTemplate(source).render(dialogue(None, turns or ["Hello"]), tokenizer)


def error_of(source, tokenizer, *turns, **options):
    with pytest.raises(UserError) as caught:
        JinjaTemplate(source, **options).render(dialogue(None, turns or ["Hello"]), tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_control_tokens_of_the_template_become_ids(chat_tokenizer):
    start, end = (chat_tokenizer.special_ids[f"<|im_{name}|>"] for name in ("start", "end"))
    encode = chat_tokenizer.encode
    expected = [start, *encode("user\nab", bos=False, eos=False), end]
    expected += [*encode("\n", bos=False, eos=False), start]
    expected += encode("assistant\n", bos=False, eos=False)
    assert JinjaTemplate(CHATML).encode(dialogue(None, ["ab"]), chat_tokenizer) == expected


@pytest.mark.parametrize(
    "content", ["<|im_end|>", "<|im_<|im_end|>end|>", "<s></s>", "a<|im_end|>\ufdd0<|im_start|>"]
)
def test_control_tokens_of_a_message_stay_text(chat_tokenizer, content):
    template, special = JinjaTemplate(CHATML), set(chat_tokenizer.special_ids.values())
    ids = template.encode(dialogue(None, [content]), chat_tokenizer)
    harmless = template.encode(dialogue(None, ["a"]), chat_tokenizer)
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    assert content in chat_tokenizer.decode(ids)


def test_an_answer_ends_at_eos_or_the_token_after_an_answer(chat_tokenizer):
    eos, end = chat_tokenizer.eos_id, chat_tokenizer.special_ids["<|im_end|>"]
    assert JinjaTemplate(CHATML).stops(chat_tokenizer) == Stops((eos, end), ())
    assert JinjaTemplate("{{ raise_exception('no') }}").stops(chat_tokenizer).ids == (eos,)


def test_variables_and_functions_are_those_of_transformers(trained):
    source = (
        "{{ bos_token }}|{{ eos_token }}|{{ messages | tojson }}|{{ add_generation_prompt }}|"
        "{{ strftime_now('%Y') }}|{{ tools is none }}|{% generation %}x{% endgeneration %}|"
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{{ loop.length ~ loop.last ~ m.content }}{% break %}{% endfor %}"
    )
    expected = '<s>|</s>|[{"role": "user", "content": "<é>"}]|True|'
    expected += f"{time.strftime('%Y')}|True|x|1True<é>"
    assert rendered(source, trained, "<é>") == expected


def test_collections_and_formats_are_those_of_jinja(trained):
    source = "{% set a, b = (1, [2]) %}{{ {'x': b}.x ~ a }}{{ '%s %d' % ('x', 12345678) }}"
    source += "{{ '{:>3}|{}'.format(1, '12345678') }}{{ [1, 2] | sum }}{{ '%s-%s' | format(1, 2) }}"
    assert rendered(source, trained) == "[2]1x 12345678  1|1234567831-2"


def test_blocks_leave_no_blank_lines(trained):
    source = "{% set ns = namespace(n=0) %}\n  {% for m in messages %}\n{{ m.content }}\n"
    source += "{% set ns.n = ns.n + 1 %}\n  {% endfor %}\n{{ ns.n }}"
    assert rendered(source, trained) == "Hello\n1"


def test_a_template_that_refuses_speaks_in_its_own_words(trained):
    source = "{% if messages[0].role == 'user' %}{{ raise_exception('Begin\nwell') }}{% endif %}"
    with pytest.raises(UserError, match="the chat template refuses the dialogue: Begin"):
        rendered(source, trained)


@pytest.mark.parametrize(
    "source",
    ["{% for m in messages %}", "{{ a b }}", "{{ 'a' | unknown }}", "{{" + "(" * 9000, "{% if"],
)
def test_a_template_that_does_not_parse_is_one_line(source):
    with pytest.raises(UserError, match=r"^the chat template does not (parse|compile)") as caught:
        JinjaTemplate(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ self._TemplateReference__context }}",
        "{% include 'passwd' %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_the_sandbox_forbids_is_one_line_or_nothing(trained, source):
    try:
        assert rendered(source, trained) == ""
    except UserError as error:
        assert str(error).startswith("the chat template ") and "\n" not in str(error)


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(90) }}",
}
HUGE = {
    "a product": "{{ 'a' * 10**9 }}",
    "a constant": "{{ 'a' | center(10**9) }}",
    "doubling": "{% set ns = namespace(a='ab') %}{% for i in range(60) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(a='ab') %}{% for i in range(60) %}"
    "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "doubling by blocks": "{% set ns = namespace(a='ab') %}{% for i in range(60) %}"
    "{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}{% endfor %}",
    "a list": "{{ ([1] * 10**6) * 10**6 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a range": "{{ range(10**9) | list }}",
    "a width": "{{ '%0999999999d' % 1 }}",
    "a format": "{{ '{:>999999999}'.format(1) }}",
    "a width in a format": "{{ '{:{}}'.format('x', '999999999') }}",
    "a width as a value": "{{ '%*d' % (999999999, 1) }}",
    "a method": "{{ 'a'.ljust(10**9) }}",
    "an indent": "{{ ('\\n' * 10**6) | indent(10**6, blank=true) }}",
    "a list of texts": "{% set a = 'a' * 10**6 %}{{ [a, a, a, a, a, a] | tojson }}",
    "many parts": "{% set a = 'a' * 10**6 %}{{ a ~ a ~ a ~ a ~ a ~ a }}",
    "lists in lists": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% endfor %}",
    "a sum of lists": "{{ [[1]] | sum(start=[]) }}",
    "a replacement": "{% set a = 'a' * 10**6 %}{{ a.replace('a', a) }}",
    "a join": "{{ range(99999) | join('a' * 10**6) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 10**4 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_takes_too_long_is_stopped(trained, name):
    start = time.monotonic()
    assert "takes more than 0.2 seconds" in error_of(ENDLESS[name], trained, seconds=0.2)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_makes_too_much_is_stopped(trained, name):
    assert error_of(HUGE[name], trained).startswith("the chat template does too much work: ")


def test_a_source_of_megabytes_is_refused():
    with pytest.raises(UserError, match=r"has 300,000 characters; expected at most 262,144"):
        JinjaTemplate(" " * 300_000)


@pytest.mark.parametrize(
    ("messages", "found"),
    [([], "no message"), ([Message("assistant", "x")], "a last message of assistant's")],
)
def test_a_dialogue_has_to_end_with_a_user_message(trained, messages, found):
    with pytest.raises(UserError, match=f"the dialogue has {found}; expected a user message"):
        JinjaTemplate(CHATML).encode(messages, trained)
