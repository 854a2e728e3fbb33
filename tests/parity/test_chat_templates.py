"""Chat formats against transformers' apply_chat_template, with the templates as published.

Two tokenizers: SentencePiece's kind, and byte-level BPE as in Llama 3 and SmolLM2.
"""

import json
import os

import pytest
from tiny_dialogues import dialogue
from tiny_weights import tiny_vocabulary

from llama_jax.errors import UserError
from llama_jax.formats.huggingface.tokenizer_writer import write_tokenizer
from llama_jax.formats.prompting import read_prompting
from llama_jax.text.chat_formats import TEMPLATES
from llama_jax.text.jinja_template import JinjaTemplate

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

ALTERNATE = "raise_exception('Conversation roles must alternate user/assistant/user/assistant/...')"
ORDER = "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ " + ALTERNATE
ORDER += " }}{% endif %}"
PUBLISHED = {
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}" + ORDER + "{% if loop.index0 == 0 and system_message != "
    "false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] "
    "%}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' "
    "%}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
    " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{%- if messages[0]['role'] == 'system' %}{%- set system_message = "
    "messages[0]['content'] %}{%- set loop_messages = messages[1:] %}{%- else %}"
    "{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}" + ORDER + "{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}{{- '[INST] ' + system_message + '\n\n' + "
    "message['content'] + ' [/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' "
    "}}{%- endif %}{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}"
    "{%- endfor %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' "
    "%}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}",
}
DIALOGUES = [
    dialogue(None, ["Hello"]),
    dialogue("Be kind.", ["Hello", "Hi there", "How are you?"]),
    dialogue("Sei höflich. 🙂", ["a  b\n- c", "```\nx = 1\n```", "日本", "1234567", "abc"]),
]


def their_ids(theirs, messages, template):
    return theirs.apply_chat_template(
        [{"role": each.role, "content": each.content} for each in messages],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_formats_and_templates_give_their_ids(both, name):
    ours, theirs = both
    for messages in DIALOGUES:
        expected = their_ids(theirs, messages, PUBLISHED[name])
        assert len(expected) > len(messages)
        assert JinjaTemplate(PUBLISHED[name]).encode(messages, ours) == expected
        assert TEMPLATES[name].encode(messages, ours) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_sources_that_are_exported_give_our_ids_there(both, name):
    ours, theirs = both
    for messages in DIALOGUES[:2]:
        expected = their_ids(theirs, messages, TEMPLATES[name].source)
        assert TEMPLATES[name].encode(messages, ours) == expected


def test_control_tokens_in_content_become_tokens_there_and_stay_text_here(both):
    ours, theirs = both
    messages = dialogue(None, ["<|im_end|>"])
    end = ours.special_ids["<|im_end|>"]
    assert their_ids(theirs, messages, PUBLISHED["chatml"]).count(end) == 2
    assert TEMPLATES["chatml"].encode(messages, ours).count(end) == 1


def test_a_template_refuses_in_the_same_words(both):
    messages = dialogue("Be kind.", ["x", "y", "z"])
    with pytest.raises(Exception, match="Conversation roles must") as theirs:
        their_ids(both[1], [*messages[:2], messages[1]], PUBLISHED["llama2"])
    with pytest.raises(UserError, match=str(theirs.value)):
        JinjaTemplate(PUBLISHED["llama2"]).encode([*messages[:2], messages[1]], both[0])


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer", ""])
@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_put_where_transformers_puts_it(kind, is_written, bos, tmp_path):
    model = tiny_vocabulary(330).to_model()
    write_tokenizer(model, bos, 512, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"tokenizer_class": kind} if kind else {}
    settings |= {"add_bos_token": bos} if is_written else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("abc").input_ids
    ours = read_prompting(tmp_path, {"vocab_size": 330}, model)
    assert ours["bos"] == (theirs[0] == 1) == bos
