"""Reads a compiled program as XLA prints it: its instructions, and how often each one runs.

Made for the optimised text of `compiled.as_text()`, on CPU, GPU and TPU. Knows no JAX and nothing
of what instructions mean, except for the loops and calls that decide how often others run.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$|^(?:ENTRY )%?([\w.-]+) \{$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+)(\d*)(?:[a-z]\w*)?\[([\d,<= ]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    result: str  # its type, such as "(f32[8,4]{1,0}, s32[])"
    opcode: str
    operands: tuple[str, ...]  # names, for those opcodes that take nothing else
    attributes: str  # what follows the operands
    is_root: bool


def arrays_of(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type as (dtype, shape): of "(f32[8,4]{1,0}, s32[])" f32 [8, 4] and s32 []."""
    found = []
    for match in _ARRAY.finditer(result):
        shape = tuple(int(size.lstrip(" <=")) for size in match[3].split(",") if size)
        found.append((match[0].split("[")[0], shape))
    return found


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Memory of an array; a token and other types without a width take none."""
    bits = 8 if dtype == "pred" else int(next(iter(re.findall(r"\d+", dtype)), 0))
    return math.ceil(math.prod(shape) * bits / 8)


class Program:
    """The computations of a compiled program, each a list of instructions."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                name = header[1] or header[2]
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    def runs(self) -> Iterator[tuple[str, Instruction, int]]:
        """Every instruction that runs, with its computation and how often a run of all runs it.

        A loop whose number of turns cannot be read counts as one turn, and so does each branch of a
        choice.
        """
        times = self._times()
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                if times.get(name):
                    yield name, instruction, times[name]

    def _times(self) -> dict[str, int]:
        """How often each computation runs."""
        times: dict[str, int] = {}
        pending = [(self.entry, 1)]
        while pending:
            name, often = pending.pop()
            times[name] = times.get(name, 0) + often
            for instruction in self.computations.get(name, {}).values():
                inner = often * (self._turns(instruction) if instruction.opcode == "while" else 1)
                pending += [(called, inner) for called in _called(instruction)]
        return times

    def _turns(self, loop: Instruction) -> int:
        """How often a loop goes round: as XLA noted, else as read from its condition and body."""
        if noted := _TRIPS.search(loop.attributes):
            return int(noted[1])
        parts = dict(re.findall(r"\b(condition|body)=%?([\w.-]+)", loop.attributes))
        condition = self.computations.get(parts.get("condition", ""), {})
        body = self.computations.get(parts.get("body", ""), {})
        test = next((found for found in condition.values() if found.is_root), None)
        if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
            return 1
        counter, bound = (condition.get(name) for name in test.operands)
        end, place = _constant(bound), _index(counter)
        if end is None or place is None:
            return 1
        root = next(found for found in body.values() if found.is_root)
        moved = body.get(root.operands[place]) if place < len(root.operands) else None
        steps = [_constant(body.get(name)) for name in moved.operands] if moved else []
        step = next((value for value in steps if value), 1)
        return max(1, math.ceil(end / step))


def _instruction(line: str) -> Instruction | None:
    """The instruction that a line holds, if it holds one."""
    match = re.match(r"^\s+(ROOT )?%?([\w.-]+) = (.*)$", line)
    if not match:
        return None
    rest = match[3]
    start = _closing(rest, 0) if rest.startswith("(") else rest.find(" ") - 1
    opcode = _OPCODE.match(rest, start + 1)
    if not opcode:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end]
    operands = (inside,) if opcode[1] == "constant" else tuple(re.findall(r"%([\w.-]+)", inside))
    if opcode[1] == "get-tuple-element":
        operands = (*operands[:1],)
    return Instruction(
        match[2], rest[: start + 1], opcode[1], operands, rest[end + 1 :], bool(match[1])
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs. The end of an asynchronous one runs nothing."""
    if instruction.opcode in ("async-update", "async-done"):
        return []
    called = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        called += [name.strip().lstrip("%") for name in branches.split(",")]
    return called


def _constant(instruction: Instruction | None) -> int | None:
    """The value of a whole constant."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.operands[0]) if instruction.operands[0].isdigit() else None


def _index(instruction: Instruction | None) -> int | None:
    """Which element of a tuple an instruction takes out."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(found[1]) if found else None
