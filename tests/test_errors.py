"""User errors: numbers in arguments, file signatures, and XLA's out-of-memory errors.

The out-of-memory texts are recorded from CPU, GPU and TPU.
"""

# ruff: noqa: E501 (recorded texts)

import re
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import (
    OutOfMemoryError,
    UsageError,
    UserError,
    catch_out_of_memory,
    describe_file,
    finite_number,
    is_out_of_memory,
    out_of_memory_message,
    whole_number,
)

NOT_NUMBERS = ["1", None, True, [1], 1j]


@pytest.mark.parametrize("value", [3, 3.0, np.float32(3), np.int8(3), Fraction(3)])
def test_finite_number_returns_a_float(value):
    number = finite_number("heat", value, lambda x: x > 0, "more than 0")
    assert type(number) is float and number == 3


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_whole_number_returns_an_int(value):
    number = whole_number("count", value, lambda x: x > 0, "more than 0")
    assert type(number) is int and number == 3


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, -np.inf, 10**400])
def test_finite_number_out_of_range_is_refused(value):
    with pytest.raises(UsageError, match=r"^heat=.* is out of range; expected more than 0$"):
        finite_number("heat", value, lambda x: x > 0, "more than 0")


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_finite_number_refuses_other_types(value):
    with pytest.raises(UsageError, match=r"^heat=.* is not a number; expected more than 0$"):
        finite_number("heat", value, lambda x: x > 0, "more than 0")


@pytest.mark.parametrize("value", [0, -1, -(10**400)])
def test_whole_number_out_of_range_is_refused(value):
    with pytest.raises(UsageError, match=r"^count=.* is out of range; expected more than 0$"):
        whole_number("count", value, lambda x: x > 0, "more than 0")


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 3.0, np.nan, np.inf])
def test_whole_number_refuses_other_types(value):
    with pytest.raises(UsageError, match=r"^count=.* is not an integer; expected more than 0$"):
        whole_number("count", value, lambda x: x > 0, "more than 0")


def test_message_shortens_long_values():
    shown = {np.float32(-2.5): "-2.5", "hot": "'hot'", 10**20: str(10**20)}
    shown[10**400] = "1" + "0" * 58 + "…"
    for value, text in shown.items():
        with pytest.raises(UsageError, match=f"^heat={text} is"):
            finite_number("heat", value, lambda x: x < 0 and x != -2.5, "less")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "only a git-LFS pointer"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"<html><head>", "a web page"),
        (b"PK\x03\x04\0\0", "a zip archive"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
    ],
)
def test_known_file_types_are_described(head, reason):
    assert describe_file(head).startswith(reason)


@pytest.mark.parametrize("head", [b"<\0\0\0", b" <\0\0\x01", b"24ka", b"\x0a\x0e", b"versio", b"P"])
def test_unknown_file_types_have_no_description(head):
    assert describe_file(head) == ""


CPU = "RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes."
CPU_WAITED = "INTERNAL: Error dispatching computation: Error dispatching computation: Out of memory allocating 1374389534720 bytes."
GPU = """RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes."""
GPU_BUFFERS = """RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.
BufferAssignment OOM Debugging.
BufferAssignment stats:
             parameter allocation:  372.76MiB
              constant allocation:    48.5KiB
        maybe_live_out allocation:    9.64GiB
     preallocated temp allocation:    4.44GiB
                 total allocation:   14.44GiB
              total fragmentation:  680.30MiB (4.60%)"""
GPU_REQUEST = (
    "RESOURCE_EXHAUSTED: Failed to allocate request for 2.99GiB (3206250496B) on device ordinal 0"
)
GPU_UNITS = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 32.00GiB."
GPU_DRIVER = "INTERNAL: failed to allocate 528.00M (553648128 bytes) from device: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
GPU_BARE = "RESOURCE_EXHAUSTED: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
TPU_USED = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 30.21G of 15.48G hbm. Exceeded hbm capacity by 14.73G.

Total hbm usage >= 30.73G:
    reserved        530.00M
    program          14.31G
    arguments        15.90G

Output size 1.0K; shares 0B with arguments.

  Largest program allocations in hbm:

  1. Size: 1.46G"""
TPU_NAMED = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:
XLA:TPU compile permanent error. Ran out of memory in memory space
hbm. Used 126.45G of 94.75G hbm. Exceeded hbm capacity by 31.70G."""
TPU_TEMPORARIES = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries (19.11G) exceeds available HBM (15.75G). HLO module: jit_f.\nSee https://openxla.org/xla/errors/error_1000 for more details."
TPU_BUFFER = "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 196.00M. That was not possible. There are 60.94M free.; (0x0x0_HBM0)"
TPU_PROGRAM = """Resource exhausted: From /job:tpu_worker/replica:0/task:0:
Attempting to reserve 3.95G at the bottom of memory. That was not possible. There are 1.92G free, 0B reserved, and 1.92G reservable.;
HBM capacity 8.00G:
       Top-of-Memory reserved:  529.00M (     554,696,704 bytes)"""
TPU_LOADING = "RESOURCE_EXHAUSTED: Error loading program 'jit__multi_slice': Attempting to reserve 6.14G at the bottom of memory. That was not possible."
TPU_OLD = "RESOURCE_EXHAUSTED: Could not allocate 10485760 bytes in memory 0x0x0_HBM0; 4374528 bytes allocatable, 14942208 bytes available"

MESSAGES = {
    CPU: "131,072.0 GiB more were needed, beyond the limit of 7.0 GiB",
    CPU_WAITED: "1,280.0 GiB more were needed, beyond the limit of 7.0 GiB",
    GPU: "4.4 GiB more were needed, beyond the limit of 7.0 GiB",
    GPU_BUFFERS: "the program needs 14.4 GiB and the device has 7.0 GiB",
    GPU_REQUEST: "3.0 GiB more were needed, beyond the limit of 7.0 GiB",
    GPU_UNITS: "32.0 GiB more were needed, beyond the limit of 7.0 GiB",
    GPU_DRIVER: "0.5 GiB more were needed, beyond the limit of 7.0 GiB",
    GPU_BARE: "the device's memory is full, all of 7.0 GiB",
    TPU_USED: "the program needs 30.2 GiB and the device has 15.5 GiB",
    TPU_NAMED: "the program needs 126.5 GiB and the device has 94.8 GiB",
    TPU_TEMPORARIES: "the program needs 19.1 GiB and the device has 15.8 GiB",
    TPU_BUFFER: "0.2 GiB more were needed and 60.9 MiB of 7.0 GiB are free",
    TPU_PROGRAM: "4.0 GiB more were needed and 1.9 GiB of 8.0 GiB are free",
    TPU_LOADING: "6.1 GiB more were needed, beyond the limit of 7.0 GiB",
    TPU_OLD: "10.0 MiB more were needed and 14.2 MiB of 7.0 GiB are free",
    "RESOURCE_EXHAUSTED: something new": "the device's memory is full, all of 7.0 GiB",
}


@pytest.mark.parametrize("text", MESSAGES, ids=lambda text: text[:60])
def test_need_and_limit_are_parsed_from_xla_errors(text):
    error = RuntimeError(text)
    assert is_out_of_memory(error)
    line = out_of_memory_message(error, "try less", limit=7 * 2**30)
    assert line == f"out of memory: {MESSAGES[text]}; try less"


@pytest.mark.parametrize("text", [CPU, GPU, TPU_BUFFER, TPU_LOADING, GPU_BARE, GPU_BUFFERS])
def test_unknown_limit_is_not_mentioned(text):
    line = out_of_memory_message(RuntimeError(text), "try less")
    assert " of 0" not in line and "limit" not in line and "all of" not in line
    assert line.endswith("; try less")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Error writing \"4/model\": No space left on device"),
        RuntimeError("RESOURCE_EXHAUSTED: Received message larger than max (9 vs. 4)"),
        RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. Used 17.0M of 16.0M vmem."),
        UserError("a checkpoint could not be written: RESOURCE_EXHAUSTED"),
        RuntimeError("INVALID_ARGUMENT: else"),
        RuntimeError("INTERNAL: Error dispatching computation: else"),
    ],
    ids=str,
)  # fmt: skip
def test_other_things_that_run_out_are_not_the_devices_memory(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, catch_out_of_memory("try less"):
        raise error
    assert raised.value is error


def test_real_cpu_allocation_errors_are_recognised():
    with (
        pytest.raises(OutOfMemoryError) as raised,
        catch_out_of_memory("try less", limit=3 * 2**30),
    ):
        jnp.zeros(1 << 50, jnp.uint8).block_until_ready()
    line = "out of memory: 1,048,576.0 GiB more were needed, beyond the limit of 3.0 GiB; try less"
    assert (str(raised.value), raised.value.exit_code) == (line, 1)
    assert "RESOURCE_EXHAUSTED" in str(raised.value.__cause__)
    with pytest.raises(OutOfMemoryError) as raised, catch_out_of_memory("try less"):
        np.ones(1 << 48, np.uint8)
    assert str(raised.value) == "out of memory: 262,144.0 GiB more were needed; try less"
    with pytest.raises(OutOfMemoryError, match="the device's memory is full; try less"):
        raise_bare_memory_error()


def test_real_error_of_a_program_with_a_failed_input_is_recognised():
    table = jax.jit(lambda x: jnp.sort(x[:, None] * x[None, :], axis=1).sum(0))
    after = jax.jit(jnp.sort)
    with pytest.raises(OutOfMemoryError) as raised, catch_out_of_memory("try less"):
        after(table(jnp.ones(1 << 24))).block_until_ready()
    assert str(raised.value) == "out of memory: 1,048,576.0 GiB more were needed; try less"
    assert str(raised.value.__cause__).startswith("INTERNAL: ")


def raise_bare_memory_error():
    with catch_out_of_memory("try less"):
        raise MemoryError


@pytest.mark.parametrize(
    ("started", "text"),
    [
        ("sample.py", "use python sample.py, or convert_meta.py; not llama2.c's train.py"),
        (
            "llama-jax sample",
            "use llama-jax sample, or llama-jax convert-meta; not llama2.c's train.py",
        ),
    ],
)
def test_commands_in_messages_are_those_that_can_be_run(monkeypatch, started, text):
    monkeypatch.setattr(sys, "argv", [started])
    message = "use python sample.py, or convert_meta.py; not llama2.c's train.py"
    assert str(UserError(message)) == text


def test_an_error_names_a_page_that_exists():
    message = str(UserError("a=1 is bad", page="pods.md"))
    assert message == "a=1 is bad; see docs/pods.md"
    root = Path(__file__).resolve().parents[1]
    sources = "".join(path.read_text() for path in (root / "llama_jax").rglob("*.py"))
    pages = set(re.findall(r'page="([^"]+)"', sources))
    assert pages > {"pods.md", "models.md"}
    assert all((root / "docs" / page).is_file() for page in pages)
