"""SmolLM2-135M-Instruct, a real model, in our code, in transformers and in llama.cpp.

All three read the same GGUF file, whose quantised matrices each dequantises to float32.
"""

import gc
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from odd_texts import odd_texts

from llama_jax.checkpoints.metadata import read_description
from llama_jax.data.prepare.documents import Chunk
from llama_jax.errors import UserError
from llama_jax.evaluation.perplexity import text_perplexity
from llama_jax.formats.convert import FORMATS, Conversion, Options, convert
from llama_jax.formats.named_models import NAMED_MODELS
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.llm import LLM
from llama_jax.text.chat import parse_messages
from llama_jax.text.chat_formats import resolve_template

pytestmark = [
    pytest.mark.parity,
    pytest.mark.optimized,
    pytest.mark.filterwarnings("ignore"),
]

QUESTION = "What is the capital of France?"
TEXT = "The history of the harbour begins in 1240, when a storm moved the mouth of the river. "
HELD_OUT = 5_000  # bytes at the end of tinyshakespeare
WINDOW = 512
DIALOGUES = [
    [{"role": "user", "content": QUESTION}],
    [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Hi  there!"}],
    [
        {"role": "user", "content": "Count to 3.\n\n"},
        {"role": "assistant", "content": "1, 2, 3."},
        {"role": "user", "content": "And backwards, from 1234567?"},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": "日本語で🙂"},
        {"role": "assistant", "content": " はい。 "},
        {"role": "user", "content": "```python\nprint('x')\n```"},
    ],
    [{"role": "user", "content": "  spaces at both ends  "}],
]


@pytest.fixture(scope="module")
def gguf_file():
    try:
        return NAMED_MODELS["smollm2"].fetch()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(gguf_file, tmp_path_factory):
    """The model as a checkpoint of ours, in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "ckpt"
    convert(Conversion(source="gguf", input=gguf_file, target="ckpt", output=folder))
    return folder


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The model as a folder for transformers, made from our checkpoint."""
    output = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(Conversion(source="ckpt", input=folder, target="hf", output=output))
    return output


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, dtype="float32", max_context=WINDOW)


@pytest.fixture(scope="module")
def theirs(gguf_file):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    yield model
    del model
    gc.collect()


@pytest.fixture(scope="module")
def their_tokenizer(exported):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(exported)


def greedy(llm, prompt, count):
    params = SamplingParams(temperature=0, max_tokens=count)
    deltas = llm.generate(Request(prompts=[prompt], params=[params]))
    return [token for delta in deltas for token in delta.ids]


def test_logits_and_greedy_tokens_equal_those_of_transformers(llm, theirs):
    import torch

    prompt = llm.tokenizer.encode(TEXT * 4)[:64]
    assert len(prompt) == 64
    with torch.no_grad():
        ids_BT = torch.tensor([prompt])
        expected_TV = theirs(ids_BT).logits[0].numpy()
        options = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}
        continued = theirs.generate(ids_BT, **options)[0, 64:].tolist()
    with jax.default_matmul_precision("highest"):
        quick = {"xla_backend_optimization_level": 0}
        logits = jax.jit(lambda model, ids_BT: model(ids_BT)[0][0], compiler_options=quick)
        found_TV = np.asarray(logits(llm.engine.model, jnp.asarray([prompt])))
    assert np.abs(found_TV - expected_TV).max() <= 1e-5 * np.abs(expected_TV).max()
    assert greedy(llm, prompt, 48) == continued


@pytest.mark.parametrize("stride", [0, 256])
def test_perplexity_equals_that_of_transformers(llm, theirs, shared_data, stride):
    """On the same windows of text that neither has seen, each token scored once."""
    import torch

    length = HELD_OUT // 2 if stride else HELD_OUT
    text = (shared_data / "tinyshakespeare.txt").read_bytes()[-length:].decode().strip()
    found = text_perplexity(llm, [Chunk(text, is_first=True, is_last=True)], stride)
    ids, total, scored = llm.tokenizer.encode(text), 0.0, 1
    last = len(ids) - WINDOW
    for start in [*range(0, last, stride or WINDOW - 1), last]:
        labels_BT = torch.tensor([ids[start : start + WINDOW]])
        ids_BT = labels_BT.clone()
        labels_BT[:, : scored - start] = -100  # scored in the window before
        with torch.no_grad():
            new = start + WINDOW - scored
            total += float(theirs(ids_BT, labels=labels_BT).loss) * new
        scored += new
    assert scored == len(ids) == found.tokens + 1
    assert found.loss == pytest.approx(total / found.tokens, rel=1e-4)
    assert found.bytes == len(text.encode()) - len(llm.tokenizer.piece_bytes(ids[0]))
    assert found.perplexity < 100


def test_ids_equal_those_of_transformers_and_llama_cpp(llm, their_tokenizer, llama_cpp, gguf_file):
    server = llama_cpp(gguf_file)
    for text in odd_texts():
        ours = llm.tokenizer.encode(text)
        expected = their_tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours == expected, repr(text)
        assert server.tokenize(text) == ours, repr(text)
        assert llm.tokenizer.decode(ours) == text, repr(text)


def test_prompts_of_dialogues_equal_those_of_transformers_and_llama_cpp(
    llm, folder, their_tokenizer, llama_cpp, gguf_file
):
    server = llama_cpp(gguf_file)
    template = resolve_template(read_description(folder).chat_template)
    for dialogue in DIALOGUES:
        ours = template.encode(parse_messages(dialogue), llm.tokenizer)
        options = {"add_generation_prompt": True, "return_dict": False}
        assert their_tokenizer.apply_chat_template(dialogue, **options) == ours
        text = their_tokenizer.apply_chat_template(dialogue, tokenize=False, **options)
        assert server.apply_template(dialogue) == text


def test_quantized_it_knows_the_capital_of_france(folder):
    llm = LLM(folder, quantize="int8", max_context=WINDOW)
    dialogue = [{"role": "user", "content": QUESTION}]
    answer = llm.chat(dialogue, temperature=0, max_tokens=64)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_there_and_back(folder, exported, tmp_path, llm, llama_cpp):
    """Through Hugging Face's format and GGUF, weights and tokenizer stay what they were."""
    options = Options(dtype="float16")
    gguf = tmp_path / "smollm2.gguf"
    convert(Conversion(source="ckpt", input=folder, target="gguf", output=gguf, options=options))
    ours = FORMATS["ckpt"].read(folder)
    for source, path in (("hf", exported), ("gguf", gguf)):
        again = FORMATS[source].read(path)
        assert again.tokenizer == ours.tokenizer
        assert again.tensors.keys() == ours.tensors.keys()
        tolerance = {"rtol": 2**-11, "atol": 1e-7} if source == "gguf" else {"rtol": 0}
        for name, tensor in ours.tensors.items():
            found = again.tensors[name].read().astype(np.float32)
            np.testing.assert_allclose(found, tensor.read(), err_msg=name, **tolerance)
    prompt = llm.tokenizer.encode(TEXT * 4)[:64]
    assert llama_cpp(gguf).complete(prompt, 48)[0] == greedy(llm, prompt, 48)


def test_loading_holds_little_memory(gguf_file):
    """The 98 MB file as float32 arrays: 538 MB, and not twice that."""
    code = """
import sys
from pathlib import Path
import numpy as np
from llama_jax.formats.gguf import model

weights = model.read(Path(sys.argv[1]))
arrays = [np.array(tensor.read()) for tensor in weights.tensors.values()]
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(sum(array.nbytes for array in arrays), 1024 * int(peak.split()[1]))
"""
    command = [sys.executable, "-c", code, str(gguf_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, peak = map(int, done.stdout.split())
    assert held == 4 * 134_515_008
    assert peak < 1.2e9
