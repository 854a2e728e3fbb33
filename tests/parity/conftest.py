"""Live references: llama.cpp's server in the package xllamacpp, and transformers' tokenizers."""

import json
import urllib.request

import pytest
from tiny_weights import tiny_vocabulary

from llama_jax.formats.huggingface.tokenizer_writer import write_tokenizer
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.tokenizer import load_tokenizer

CONTROLS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


class LlamaCpp:
    """A GGUF file opened by llama.cpp."""

    def __init__(self, path, context=512):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(path), context, 1
        params.warmup, params.verbosity = False, -1
        params.cpuparams.n_threads = 1  # several spin for each other when cores lack
        params.cpuparams_batch.n_threads = 1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def _post(self, place, **body):
        url, kind = self.server.listening_address + place, {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def tokenize(self, text, bos=False):
        """Ids of a text in which nothing is a control token."""
        body = {"content": text, "add_special": bos, "parse_special": False}
        return self._post("/tokenize", **body)["tokens"]

    def complete(self, ids, count, probabilities=0):
        """The greedy continuation of a prompt, and what the server says of each token."""
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True}
        body |= {"n_probs": probabilities, "cache_prompt": False, "repeat_penalty": 1.0}
        answer = self._post("/completion", **body)
        return answer["tokens"], answer.get("completion_probabilities", [])

    def apply_template(self, messages):
        """The prompt of a dialogue as the file's chat template writes it."""
        return self._post("/apply-template", messages=messages)["prompt"]


@pytest.fixture(scope="session")
def llama_cpp():
    """Open a GGUF file in llama.cpp; skips where it is not installed."""
    pytest.importorskip("xllamacpp")
    return LlamaCpp


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def both(request, tmp_path_factory):
    """Our tokenizer and that of transformers, of the same files with control tokens of chats."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "sentencepiece":
        pieces = tiny_vocabulary(330).pieces
        pieces += tuple(Piece(text, 0.0, Kind.CONTROL) for text in CONTROLS)
        write_tokenizer(Vocabulary(pieces=pieces).to_model(), True, 512, folder)
        ours = load_tokenizer(folder / "tokenizer.model")
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.train_from_iterator(
            ["Hello there, how are you? user assistant system\n\n" * 9],
            tokenizers.trainers.BpeTrainer(
                vocab_size=340,
                special_tokens=["<s>", "</s>", *CONTROLS],
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        made.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>"}))
        ours = load_tokenizer(folder / "tokenizer.json")
    return ours, transformers.AutoTokenizer.from_pretrained(folder)
