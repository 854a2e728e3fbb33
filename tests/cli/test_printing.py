"""Samples are printed in order, in whatever order their sequences grow."""

from types import SimpleNamespace

from llama_jax.cli import sample as printing
from llama_jax.inference.request import Delta, Request, SamplingParams


def delta(index, text, tokens=1, reason=""):
    return Delta(index, (5,) * tokens, (), reason, text)


def test_one_text_is_printed_as_it_grows(capsys):
    seen = []

    def deltas():
        for text in ("Once", " a", " b"):
            yield delta(0, text)
            seen.append(capsys.readouterr().out)
        yield delta(0, ".", reason="stop")

    list(printing.print_in_order(1, deltas()))
    assert seen == ["Once", " a", " b"]
    rest = capsys.readouterr()
    assert (rest.out, rest.err) == (".\n", "")


def test_texts_are_printed_in_order_with_an_empty_line_between(capsys):
    deltas = [
        delta(0, "A a"),
        delta(1, "B c"),
        delta(2, " e", reason="length"),
        delta(0, " b"),
        delta(1, " d", reason="stop"),
        delta(0, "!", reason="length"),
    ]
    # The first prompt and its tokens do not fit in the context.
    params = SamplingParams(max_tokens=3)
    request = Request(prompts=[[1] * 8, [1], [1]], params=[params] * 3)
    llm = SimpleNamespace(generate=lambda request: iter(deltas), context_length=10)
    printing.print_samples(llm, request, start=0)
    printed = capsys.readouterr()
    assert printed.out == "A a b!\n\nB c d\n\n e\n"
    assert printed.err.splitlines()[2:] == [
        "[sample 1: stopped where the model's context is full]",
        "[sample 3: stopped after --max_tokens]",
    ]


def test_the_speed_of_one_chunk_counts_from_the_first_token(capsys, monkeypatch):
    times = iter([103.5, 108.5])
    monkeypatch.setattr(printing.time, "perf_counter", lambda: next(times))
    deltas = [delta(0, "a"), delta(0, "b", 20, "stop")]
    assert list(printing.report_speed(deltas, start=100)) == deltas
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "\n[first token after 3.50 s, then 4 tokens/s]\n"


def test_the_speed_excludes_the_chunk_whose_program_is_compiled(capsys, monkeypatch):
    times = iter([101, 102, 191, 192, 194, 196])  # a first token, a compiled chunk, two rows each
    monkeypatch.setattr(printing.time, "perf_counter", lambda: next(times))
    each = [1, 1, 16, 16, 16, 4]
    deltas = [delta(n % 2, "a", tokens) for n, tokens in enumerate(each)]
    list(printing.report_speed(deltas, start=100))
    assert capsys.readouterr().err == "\n[first token after 2.00 s, then 5 tokens/s]\n"


def test_one_delta_has_no_speed(capsys):
    list(printing.report_speed([delta(0, "a", reason="stop")], start=0))
    assert capsys.readouterr().err.endswith(", then one token]\n")
