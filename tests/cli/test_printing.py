"""What is printed, where and in which order, whatever order the rows grow in."""

from llama_jax.cli import chat as printing
from llama_jax.inference.completions import Piece


def printed(capsys, prompts, pieces):
    list(printing._print_in_order(prompts, pieces))
    return capsys.readouterr()


def test_one_row_is_printed_as_it_grows(capsys):
    seen = []

    def pieces():
        for text in ("", " a", " b"):
            yield Piece(0, text, (5,), "")
            seen.append(capsys.readouterr().out)
        yield Piece(0, ".", (5,), "stop")

    rest = printed(capsys, ["Once"], pieces())
    assert seen == ["Once", " a", " b"]
    assert (rest.out, rest.err) == (".\n", "")


def test_rows_are_printed_in_order_with_an_empty_line_between(capsys):
    pieces = [
        Piece(0, " a", (5,), ""),
        Piece(1, " c", (5,), ""),
        Piece(2, " e", (5,), "length"),
        Piece(0, " b", (5,), ""),
        Piece(1, " d", (5,), "stop"),
        Piece(0, "!", (5,), "context"),
    ]
    said = printed(capsys, ["A", "B", ""], pieces)
    assert said.out == "A a b!\n\nB c d\n\n e\n"
    assert said.err.splitlines() == [
        "[sample 1: stopped where the model's context is full]",
        "[sample 3: stopped after --max_tokens]",
    ]


def test_speed_counts_what_comes_after_the_first_piece(capsys, monkeypatch):
    times = iter([103.5, 108.5])
    monkeypatch.setattr(printing.time, "perf_counter", lambda: next(times))
    pieces = [Piece(0, "a", (5,), ""), Piece(0, "b", (5,) * 20, "stop")]
    assert list(printing._timed(pieces, begun=100)) == pieces
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "\n[first token after 3.50 s, then 4 tokens/s]\n"


def test_speed_leaves_out_the_chunk_whose_program_is_compiled(capsys, monkeypatch):
    times = iter([101, 102, 191, 192, 194, 196])  # a first token, a compiled chunk, two rows each
    monkeypatch.setattr(printing.time, "perf_counter", lambda: next(times))
    each = [1, 1, 16, 16, 16, 4]
    pieces = [Piece(n % 2, "a", (5,) * tokens, "") for n, tokens in enumerate(each)]
    list(printing._timed(pieces, begun=100))
    assert capsys.readouterr().err == "\n[first token after 2.00 s, then 5 tokens/s]\n"


def test_one_piece_has_no_speed(capsys):
    list(printing._timed([Piece(0, "a", (5,), "stop")], begun=0))
    assert capsys.readouterr().err.endswith(", then one token]\n")
