"""The command sample.py: output streams, flags, and one-line errors."""

import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compilation import xla_flags
from flax import nnx

from llama_jax.checkpoints import metadata
from llama_jax.checkpoints.run_folder import Run, write_metadata
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.cli import main as cli
from llama_jax.cli import sample as sample_command
from llama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from llama_jax.inference.request import SamplingParams
from llama_jax.model.transformer import Llama
from llama_jax.text.sentencepiece import train_tokenizer
from llama_jax.text.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
DOOR = [sys.executable, str(REPOSITORY / "sample.py")]
STORIES = [f"Tim had {n} red sails. The sea was blue and the sun was warm." for n in range(50)]
SIZES = {"dim": 24, "num_layers": 1, "num_heads": 6, "num_kv_heads": 2, "tied_embeddings": False}
RATE = r"[\d,]+ tokens/s"
SPEED = re.compile(rf"\n\[first token after \d+\.\d\d s, then {RATE}\]\n")
FULL = "[stopped where the model's context is full]\n"
ENOUGH = "[stopped after --max_tokens]\n"
SHORT = ("--max_tokens=8", "--seed=1", "--top_p=1")
TWO = ("--prompt=Tim had", "--prompt=", "--max_tokens=40", "--seed=3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a run in ckpt/ with random parameters, and a tokenizer of another size."""
    folder = tmp_path_factory.mktemp("place")
    tokenizer = train_tokenizer(STORIES, 300, folder / "t.model")
    train_tokenizer(STORIES, 290, folder / "other.model")
    config = Config(
        model=ModelConfig(vocab_size=tokenizer.vocab_size, context_length=48, **SIZES),
        data=DataConfig(path="data", batch_size=1, sequence_length=2),
        optimizer=OptimizerConfig(steps=1, learning_rate=1e-3, warmup_steps=0),
    )
    (folder / "ckpt").mkdir()
    write_metadata(folder / "ckpt", Run(config=config, bos=True, eos=False), tokenizer.path)
    nothing = {"count": jnp.int32(0)}
    writer = CheckpointWriter(folder / "ckpt", keep_last=2)
    for step in (5, 10):
        writer.save(step, Llama(config.model, rngs=nnx.Rngs(step)), nothing, {}, 1.0)
    writer.close()
    return folder


@pytest.fixture
def sample(place, monkeypatch, capsys, tmp_path):
    """Run the command in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)  # no cache for other tests

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words])
        with pytest.raises(SystemExit) as end:
            cli.run(sample_command.main)
        return end.value.code, *capsys.readouterr()

    return run


def in_another_process(place, *words, pipe=""):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": xla_flags()}
    environment |= {"LLAMA_JAX_CACHE": str(place / "cache")}
    command = f"{shlex.join([*DOOR, *words])} {pipe}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_flags_have_the_defaults_of_the_library():
    parser, defaults = sample_command.parser(), SamplingParams()
    for field in dataclasses.fields(SamplingParams):
        value = parser.get_default(field.name)
        default = getattr(defaults, field.name)
        is_recommended = field.name in sample_command.SAMPLING and value is None
        assert value == default or not (value or default) or is_recommended, field.name
    assert set(sample_command.SAMPLING) == set(metadata.SAMPLING)


@pytest.fixture(scope="module")
def first(place):
    """A finished process that continued two prompts."""
    return in_another_process(place, *TWO)


def test_only_text_goes_to_stdout(first):
    assert first.returncode == 0, first.stderr
    prompted, unprompted = first.stdout.removesuffix("\n").split("\n\n")
    assert prompted.startswith("Tim had") and len(prompted) > 7 and unprompted
    assert SPEED.match(first.stderr)
    stderr = SPEED.sub("", first.stderr).splitlines()
    assert all(re.fullmatch(r"\[sample [12]: stopped [^]]+\]", line) for line in stderr)


def test_prompts_are_continued_in_order(sample):
    code, alone, stderr = sample(*SHORT, "--prompt=The sea")
    assert (code, alone[:7], alone[-1]) == (0, "The sea", "\n")
    assert SPEED.sub("", stderr) == ENOUGH
    code, both, _ = sample(*SHORT, "--prompt=The sea", "--prompt=Tim had 7 red sails. The")
    assert both.startswith(alone + "\nTim had 7 red sails. The")
    code, other, _ = sample(*SHORT, "--prompt=Tim had 7 red sails. The", "--prompt=The sea")
    assert other.split("\n\n")[0] + "\n" == both.removeprefix(alone + "\n")


def test_an_empty_prompt_starts_from_bos(sample):
    code, text, _ = sample(*SHORT, "--prompt=")
    assert code == 0 and len(text) > 1
    assert sample(*SHORT)[1] == text


def test_without_a_prompt_the_text_begins_as_in_training(sample, place, tmp_path):
    copy = shutil.copytree(place / "ckpt", tmp_path / "ckpt")
    tree = json.loads((copy / "config.json").read_text())
    tree["config"]["run"]["sample_prompt"] = "Tim had"
    (copy / "config.json").write_text(json.dumps(tree))
    words = ("--ckpt", str(copy), "--max_tokens=8")
    code, text, stderr = sample(*words)
    assert code == 0 and "[prompt 'Tim had', as in training;" in stderr
    assert text == sample(*words, "--prompt=Tim had")[1]
    assert text != sample(*words, "--prompt=")[1]


def test_sample_j_has_the_seed_plus_j(sample):
    words = ("--prompt=Tim", "--max_tokens=8", "--temperature=2", "--top_p=1")
    _, both, _ = sample(*words, "--num_samples=2", "--seed=4")
    first, second = both.removesuffix("\n").split("\n\n")
    assert sample(*words, "--seed=5")[1] == second + "\n"
    assert sample(*words, "--seed=4")[1] == first + "\n" != second + "\n"


def test_a_full_context_is_reported(sample):
    code, _, stderr = sample("--prompt=Tim", *SHORT, "--max_tokens=1000")
    assert (code, SPEED.sub("", stderr)) == (0, FULL)


def test_one_token_has_no_speed(sample):
    code, _, stderr = sample("--prompt=Tim", *SHORT, "--max_tokens=1")
    assert code == 0
    assert re.fullmatch(r"\n\[first token after [\d.]+ s, then one token\]\n\[.*\]\n", stderr)


def test_paths_of_a_checkpoint(sample, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    newest = sample(*SHORT)
    assert newest[0] == 0
    for path in ("ckpt/", f"{place}/ckpt", "~/ckpt", "./ckpt/../ckpt", "ckpt/10", "ckpt/10/"):
        assert sample(*SHORT, "--ckpt", path)[:2] == newest[:2], path
    older = sample(*SHORT, "--ckpt=ckpt/5")
    assert older[0] == 0 and older[1] != newest[1]
    monkeypatch.chdir(place / "ckpt")
    assert sample(*SHORT, "--ckpt=.")[:2] == newest[:2]
    assert sample(*SHORT, "--ckpt=5")[:2] == older[:2]
    monkeypatch.chdir(place / "ckpt" / "5")
    assert sample(*SHORT, "--ckpt=.")[:2] == older[:2]


def changes(folder):
    """When each file and folder last changed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_checkpoint_is_only_read(sample, place, tmp_path):
    shutil.copytree(place / "ckpt", tmp_path / "ckpt")
    before = changes(tmp_path / "ckpt")
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    code, text, stderr = sample(*SHORT, "--ckpt", str(tmp_path / "ckpt"))
    assert code == 0, stderr
    assert text == sample(*SHORT)[1]
    assert changes(tmp_path / "ckpt") == before
    for path in before:
        path.chmod(0o755)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(sample, place, tmp_path):
    shutil.copytree(place / "ckpt", tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "10" / "model")
    code, text, stderr = sample(*SHORT, "--ckpt", str(tmp_path / "ckpt"))
    assert (code, text) == (0, sample(*SHORT, "--ckpt=ckpt/5")[1])
    warning = stderr.splitlines()[0]
    assert warning.startswith("warning: ") and warning.endswith("falling back to step 5")


USAGE = {
    ("--temperature=-1",): "temperature=-1.0 is out of range; expected 0 (greedy) or more",
    ("--temperature=nan",): "temperature=nan is out of range",
    ("--temperature=warm",): "argument --temperature: invalid float value: 'warm'",
    ("--top_p=0",): "top_p=0.0 is out of range; expected more than 0, up to 1",
    ("--top_p=2",): "top_p=2.0 is out of range",
    ("--top_k=-1",): "top_k=-1 is out of range; expected 0 (off) or more",
    ("--max_tokens=0",): "max_tokens=0 is out of range; expected 1 or more",
    ("--num_samples=0",): "num_samples=0 is out of range; expected 1 to 10000",
    ("--num_samples=3000000000",): "num_samples=3000000000 is out of range",
    ("--seed=-1",): "seed=-1 is out of range; expected 0 to",
    ("--temprature=1",): "'--temprature=1' is not understood; did you mean '--temperature'?",
    ("Once upon",): "'Once upon' is not understood; did you mean --prompt 'Once upon'?",
    ("--serve",): "'--serve' is not understood; see --help",
    ("--max_length=9",): "'--max_length=9' is not understood; did you mean '--max_tokens'?",
    ("--prompt",): "argument --prompt: expected one argument",
    ("--min_p=2",): "min_p=2.0 is out of range; expected 0 (off) to 1",
    ("--repetition_penalty=0",): "repetition_penalty=0.0 is out of range",
    ("--logit_bias=the",): "--logit_bias=the is invalid; expected ID=BIAS",
    ("--stop=",): "stop",
    ("--chat", "--score"): "--chat and --score exclude each other; choose one",
    ("--chat", "--prompt=Tim"): "--chat does not use --prompt; leave it out",
    ("--chat", "--json"): "--chat does not use --json; leave it out",
    ("--score", "--top_k=3"): "--score does not use --top_k; leave it out",
    ("--messages=m.json", "--system=s"): "--messages does not use --system; leave it out",
    ("--system=Be kind.",): "--system needs --chat or --messages; add one of them",
    ("--truncate",): "--truncate needs --chat or --messages",
    ("--speculate",): "speculate=True guesses the most likely token; use it with temperature=0",
    ("--chat", "--speculate"): "speculate=True guesses the most likely token",
    ("--logit_bias=3=1", "--logit_bias=3=2"): "--logit_bias=3=2 is the second for token 3",
    ("--prompt=Tim", "--prompt_file=x"): "--prompt and --prompt_file exclude each other",
    ("--rng=dice",): "argument --rng: invalid choice: 'dice'",
    ("--rng=xorshift", "--seed=1", "--num_samples=2"): "--rng=xorshift generates one sample",
    (
        "--rng=xorshift",
        "--seed=1",
        "--prompt=a",
        "--prompt=b",
    ): "--rng=xorshift generates one sample",
    ("--rng=xorshift", "--seed=1", "--top_k=5"): "top_k=5 does not go with rng='xorshift'",
    ("--rng=xorshift", "--seed=1", "--min_p=.1", "--chat"): "min_p=0.1 does not go with rng=",
    ("--rng=xorshift", "--seed=1", "--logit_bias=3=1"): "logit_bias={3: 1.0} does not go with",
    ("--rng=xorshift", "--seed=1", "--speculate"): "speculate=True does not go with rng='xorshift'",
    ("--rng=xorshift", "--seed=1", "--logprobs=1"): "logprobs=1 does not go with rng='xorshift'",
    ("--regex=a(",): "regex='a(' cannot be used: unclosed group; change it",
    ("--json_schema={",): "json_schema='{' is not JSON: Expecting property name",
    ("--regex=a", "--json_schema={}"): "json_schema and regex exclude each other; choose one",
    ("--tensor=3000",): "tensor=3000 is out of range; expected 1 to",
    ("--template=chatm", "--chat"): "template='chatm' is unknown; expected one of llama2, alpaca",
    ("--cache_dtype=int4",): "cache_dtype='int4' is unknown; expected 'int8' or ''",
}


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_a_wrong_flag_is_one_line(sample, words):
    code, text, stderr = sample("--ckpt=missing", *words)
    assert (code, text) == (2, "")
    assert stderr.startswith(f"error: {USAGE[words]}") and stderr.count("\n") == 1


def swap_tokenizer(folder):
    shutil.copy(folder.parent / "other.model", folder / "tokenizer.model")


def remove_steps(folder):
    for step in ("5", "10"):
        shutil.rmtree(folder / step)


def damage_steps(folder):
    for step in ("5", "10"):
        shutil.rmtree(folder / step / "model")


def leave_half_a_step(folder):
    remove_steps(folder)
    (folder / "5.orbax-checkpoint-tmp-7").mkdir()


DAMAGES = {
    "missing": (shutil.rmtree, "ckpt does not exist; expected a checkpoint folder"),
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "ckpt holds no run"),
    "foreign": (lambda folder: (folder / "config.json").write_text('{"dim": 8}'), "is damaged"),
    "no steps": (remove_steps, "ckpt has no finished checkpoint"),
    "half a step": (leave_half_a_step, "ckpt has no finished checkpoint"),
    "damaged": (damage_steps, "none of the checkpoints in"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "does not exist"),
    "another tokenizer": (
        swap_tokenizer,
        "tokenizer.model is not the file that the checkpoint was saved with",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_that_cannot_be_used_is_one_line(sample, place, tmp_path, name):
    shutil.copytree(place / "ckpt", tmp_path / "ckpt")
    shutil.copy(place / "other.model", tmp_path)
    damage, message = DAMAGES[name]
    damage(tmp_path / "ckpt")
    code, text, stderr = sample("--ckpt", str(tmp_path / "ckpt"))
    assert (code, text) == (1, "")
    lines = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_checkpoint_that_is_a_file_is_one_line(sample):
    code, text, stderr = sample("--ckpt=t.model")
    assert (code, text) == (1, "")
    assert stderr.startswith("error: t.model ") and stderr.count("\n") == 1


def test_a_prompt_too_long_is_one_line(sample):
    code, text, stderr = sample("--prompt=Tim", "--prompt=" + "sea " * 99)
    assert (code, text) == (1, "")
    assert re.fullmatch(r"error: the prompt has \d+ tokens; expected 1 to 47,.* 48\n", stderr)


def test_a_prompt_from_a_file_or_stdin(sample, tmp_path, monkeypatch):
    expected = sample(*SHORT, "--prompt=Tim had")[1]
    (tmp_path / "p.txt").write_text("Tim had")
    assert sample(*SHORT, "--prompt_file", str(tmp_path / "p.txt"))[1] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("Tim had"))
    assert sample(*SHORT, "--prompt_file=-")[1] == expected
    (tmp_path / "p.txt").write_bytes(b"Tim \xff")
    code, _, stderr = sample("--prompt_file", str(tmp_path / "p.txt"))
    assert (code, stderr.count("\n")) == (1, 1) and "is not UTF-8 at byte 4" in stderr
    monkeypatch.setattr("sys.stdin", io.StringIO("Tim had\r\n"))  # as `echo` ends it
    assert sample(*SHORT, "--prompt_file=-")[1] == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Tim \xff"), "utf-8"))
    assert sample("--prompt_file=-")[2] == (
        "error: --prompt_file=- is not UTF-8 at byte 4; convert it\n"
    )
    monkeypatch.setattr("sys.stdin", None)
    assert sample("--prompt_file=-")[2].startswith("error: --prompt_file=- reads standard input, ")
    code, _, stderr = sample("--prompt_file=missing.txt")
    assert (code, stderr) == (1, "error: --prompt_file=missing.txt: No such file or directory\n")


def test_a_text_ends_before_its_stop_string_and_may_omit_the_prompt(sample):
    free = sample(*SHORT, "--temperature=0", "--prompt=Tim")[1]
    new = free.removeprefix("Tim").rstrip("\n")
    stop = new[3:6]
    code, text, _ = sample(*SHORT, "--temperature=0", "--prompt=Tim", "--no_echo", "--stop", stop)
    assert (code, text) == (0, new[: new.index(stop)] + "\n")


def test_log_probabilities_go_to_stderr(sample):
    plain = sample(*SHORT, "--temperature=0", "--prompt=Tim")[1]
    code, text, stderr = sample(*SHORT, "--temperature=0", "--prompt=Tim", "--logprobs=2")
    assert (code, text) == (0, plain)
    lines = [line for line in stderr.splitlines() if line.startswith("[1] ")]
    assert len(lines) == 8
    assert all(float(line.split()[1]) <= 0 and line.count("'") >= 6 for line in lines)


def test_a_text_may_be_constrained(sample, tmp_path):
    (tmp_path / "s.json").write_text('{"enum": ["Tim", "Anna"]}')
    (tmp_path / "g.lark").write_text('start: "Tim" | "Anna"')
    words = ("--prompt=Tim", "--no_echo", "--max_tokens=9")
    for flag in (f"--json_schema={tmp_path}/s.json", f"--grammar={tmp_path}/g.lark", "--regex=Tim"):
        code, text, _ = sample(*words, flag)
        assert code == 0 and text.strip().strip('"') in ("Tim", "Anna")
    code, _, stderr = sample(*words, "--grammar=missing.lark")
    assert code == 1 and stderr == "error: --grammar=missing.lark: No such file or directory\n"


@pytest.mark.parametrize("words", [("--speculate",), ("--rng=xorshift",)])
def test_speculation_and_xorshift_give_the_same_greedy_text(sample, words):
    greedy = ("--temperature=0", "--prompt=Tim had", "--max_tokens=20", "--seed=1")
    assert sample(*greedy, *words)[:2] == sample(*greedy)[:2]


def test_an_int8_cache_generates(sample):
    code, text, _ = sample(*SHORT, "--cache_dtype=int8", "--prompt=Tim")
    assert code == 0 and text.startswith("Tim") and len(text) > 8


def test_scores_and_embeddings_are_printed_as_lines(sample):
    code, text, _ = sample("--score", "--prompt=Tim had 7 red sails.", "--prompt=zzzz qqqq")
    usual, odd = ([float(word) for word in line.split("\t")] for line in text.splitlines())
    assert code == 0
    for total, tokens, perplexity in (usual, odd):
        assert perplexity == pytest.approx(math.exp(-total / tokens), rel=1e-3)
    code, text, _ = sample("--embed", "--prompt=Tim", "--prompt=sea")
    vectors = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [len(vector) for vector in vectors] == [24, 24]


def test_scores_and_samples_as_json(sample):
    code, text, stderr = sample(
        "--score", "--json", "--prompt=Tim had 7 red sails.", "--prompt=sea"
    )
    score, _ = (json.loads(line) for line in text.splitlines())
    assert (code, stderr) == (0, "")
    assert score["total"] == pytest.approx(sum(score["logprobs"]))
    assert len(score["token_ids"]) == len(score["logprobs"]) + 1
    words = ("--json", "--prompt=Tim", "--num_samples=2", "--max_tokens=3", "--logprobs=1")
    code, text, stderr = sample(*words, "--temperature=0")
    first, second = (json.loads(line) for line in text.splitlines())
    assert (code, stderr) == (0, "") and first == second and first["text"].startswith("Tim")
    assert len(first["token_ids"]) == len(first["logprobs"]) == first["usage"]["completion_tokens"]


def test_a_chat_reads_lines_and_answers(sample, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Tim\n/reset\nTim\n/exit\n"))
    code, text, stderr = sample("--chat", "--temperature=0", "--max_tokens=4", "--template=llama2")
    assert code == 0
    first, again = text.splitlines()
    assert first == again, "the same question of a new dialogue"
    assert "[a new dialogue]" in stderr
    assert stderr.startswith("[chat format: llama2]\n")


def test_a_chat_with_a_checkpoint_without_a_format_warns_once(sample, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    code, _, stderr = sample("--chat")
    assert code == 0 and stderr.count("warning: ") == 1
    assert stderr.startswith("[warning: chat format: llama2, since the checkpoint records none;")


def test_a_prompt_may_be_token_ids(sample, place):
    code, text, _ = sample(*SHORT, "--temperature=0", "--prompt=Tim")
    ids = load_tokenizer(place / "ckpt" / "tokenizer.model").encode("Tim", bos=True)
    words = ", ".join(map(str, ids))
    assert sample(*SHORT, "--temperature=0", f"--prompt_ids={words}")[:2] == (code, text)
    code, _, stderr = sample("--prompt_ids=1 x")
    assert (code, stderr.count("\n")) == (2, 1) and "--prompt_ids=1 x is invalid" in stderr


def test_what_the_model_recommends_is_said_and_used(sample, place, tmp_path):
    copy = shutil.copytree(place / "ckpt", tmp_path / "ckpt")
    values = json.loads((copy / "config.json").read_text())
    values |= {"kind": "llama_jax model", "model": values["config"]["model"]}
    values |= {"generation": {"temperature": 0, "top_k": 5}}
    (copy / "config.json").write_text(json.dumps(values))
    words = ("--prompt=Tim", "--max_tokens=8", "--ckpt", str(copy))
    code, text, stderr = sample(*words)
    assert code == 0 and "[as the model recommends: temperature 0, top_k 5]\n" in stderr
    assert sample(*words, "--temperature=0", "--top_k=0")[1] == text
    assert "recommends: top_k 5]" in sample(*words, "--temperature=1")[2]


def test_messages_of_a_file_are_answered(sample, tmp_path, monkeypatch):
    messages = [{"role": "user", "content": "Tim"}]
    (tmp_path / "m.json").write_text(json.dumps(messages))
    words = ("--temperature=0", "--max_tokens=4", "--template=llama2")
    monkeypatch.setattr("sys.stdin", io.StringIO("Tim\n"))
    code, text, _ = sample("--chat", *words)
    assert sample("--messages", str(tmp_path / "m.json"), *words)[:2] == (0, text) == (code, text)
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(messages)))
    assert sample("--messages=-", *words)[:2] == (0, text)

    turns = [{"role": role, "content": "Tim"} for role in ("user", "assistant")] * 20
    (tmp_path / "m.json").write_text(json.dumps([*turns, *messages]))
    code, _, stderr = sample("--messages", str(tmp_path / "m.json"), "--truncate", *words)
    assert code == 0
    assert stderr.startswith("[chat format: llama2]\n")
    assert re.search(r"\n\[the dialogue has \d+ tokens, .* exchanges were left out\]\n", stderr)
    assert sample("--messages=") == (1, "", "error: --messages=: Is a directory\n")


def test_a_missing_text_is_said(sample, tmp_path):
    for mode in ("--score", "--embed"):
        line = f"error: {mode} needs a text; add --prompt or --prompt_file\n"
        assert sample(mode) == (2, "", line)
    assert sample("--score", "--prompt=Tim")[2] == "logprob\ttokens\tperplexity\n"
    (tmp_path / "empty").write_text("\n")
    code, _, stderr = sample(f"--prompt_file={tmp_path / 'empty'}", "--max_tokens=1")
    assert code == 0 and stderr.startswith(
        f"warning: --prompt_file={tmp_path / 'empty'} is empty\n"
    )


def test_xorshift_with_seed_0_takes_and_prints_the_time(sample):
    words = ("--rng=xorshift", "--max_tokens=4", "--prompt=Tim")
    code, text, stderr = sample(*words)
    seed = re.match(r"\[(--seed=\d+), from the clock\]\n", stderr)[1]
    assert code == 0 and sample(*words, seed)[1] == text


@pytest.mark.parametrize("flag", ["--prompt_file", "--messages"])
def test_a_bom_is_dropped_and_utf16_is_named(sample, tmp_path, flag):
    path, text = tmp_path / "text", '[{"role": "user", "content": "Tim"}]'
    words = (flag, str(path), "--temperature=0", "--max_tokens=4")
    path.write_text(text)
    expected = sample(*words)[:2]
    path.write_text(text, encoding="utf-8-sig")
    assert sample(*words)[:2] == expected
    path.write_text(text, encoding="utf-16")
    complaint = f"error: {flag}={path} is UTF-16; convert it to UTF-8\n"
    assert sample(*words) == (1, "", complaint)


WRONG_MESSAGES = {
    "no file": (None, "No such file or directory"),
    "no JSON": ("[{]", "is not JSON: Expecting property name"),
    "no list": ('{"role": "user"}', "is not a list; expected a list of messages"),
    "a role": ('[{"role": "bot", "content": "x"}]', "messages[0].role='bot' is unknown"),
    "no content": ('[{"role": "user"}]', "messages[0] has no content"),
    "out of order": ('[{"role": "assistant", "content": "x"}]', "is out of order"),
    "too deep": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("name", WRONG_MESSAGES)
def test_a_malformed_message_file_is_one_line(sample, tmp_path, name):
    content, message = WRONG_MESSAGES[name]
    if content is not None:
        (tmp_path / "m.json").write_text(content)
    code, text, stderr = sample("--messages", str(tmp_path / "m.json"))
    assert (code, text) == (1, "")
    *notices, error = stderr.splitlines()
    assert message in error and error.startswith("error: ")
    # Roles depend on the chat format, which is said before they are checked.
    assert len(notices) == (name == "out of order")
