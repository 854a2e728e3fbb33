"""Collectives of a compiled program, and how often each one runs, parsed from optimized HLO text.

The text is that of `compiled.as_text()` on CPU, GPU or TPU. A collective inside a loop counts once
per iteration, so that the sums are those of one run of the program. Asynchronous ones, split into a
start and a done, count once, and so does a collective that a TPU splits into steps of several
fusions.
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
    """One instruction of a program."""

    name: str
    result: str  # its type, such as "(f32[8,4]{1,0}, s32[])"
    opcode: str
    operands: tuple[str, ...]  # names; of a constant its value, of a parameter its number
    attributes: str  # the text after the operands
    is_root: bool


def nbytes(result: str) -> int:
    """Return the bytes of the arrays in a type such as "(f32[8,4]{1,0}, s32[])"."""
    total = 0
    for dtype, digits, dims in _ARRAY.findall(result):
        size = math.prod(int(dim.lstrip(" <=")) for dim in dims.split(",") if dim)
        bits = 8 if dtype == "pred" else int(digits or 0)  # a token has no width
        total += math.ceil(size * bits / 8)
    return total


class Program:
    """The computations of a compiled program by name, each with its instructions by name."""

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
        """Yield (computation, instruction, times): how often one run of the program executes it.

        A loop whose trip count is unknown counts as one iteration, and so does each branch of a
        conditional.
        """
        times = self._times()
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                if times.get(name):
                    yield name, instruction, times[name]

    def _times(self) -> dict[str, int]:
        """Return how often each computation runs."""
        times: dict[str, int] = {}
        pending = [(self.entry, 1)]
        while pending:
            name, often = pending.pop()
            times[name] = times.get(name, 0) + often
            for instruction in self.computations.get(name, {}).values():
                inner = often * (
                    self._trip_count(instruction) if instruction.opcode == "while" else 1
                )
                pending += [(called, inner) for called in _called(instruction)]
        return times

    def _trip_count(self, loop: Instruction) -> int:
        """Return the iterations of a loop: as XLA annotated, else from its condition and body."""
        if annotated := _TRIPS.search(loop.attributes):
            return int(annotated[1])
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
        update = body.get(root.operands[place]) if place < len(root.operands) else None
        steps = [_constant(body.get(name)) for name in update.operands] if update else []
        step = next((value for value in steps if value), 1)
        return max(1, math.ceil(end / step))


def _instruction(line: str) -> Instruction | None:
    """Return the instruction on a line; None for any other line."""
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
    is_leaf = opcode[1] in ("constant", "parameter")
    operands = (inside,) if is_leaf else tuple(re.findall(r"%([\w.-]+)", inside))
    if opcode[1] == "get-tuple-element":
        operands = (*operands[:1],)
    return Instruction(
        match[2], rest[: start + 1], opcode[1], operands, rest[end + 1 :], bool(match[1])
    )


def _closing(text: str, opening: int) -> int:
    """Return the position where the parenthesis at `opening` closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _called(instruction: Instruction) -> list[str]:
    """Return the computations that an instruction calls; the done of an async one calls none."""
    if instruction.opcode in ("async-update", "async-done"):
        return []
    called = _CALLED.findall(instruction.attributes)
    for branches in _BRANCHES.findall(instruction.attributes):
        called += [name.strip().lstrip("%") for name in branches.split(",")]
    return called


def _constant(instruction: Instruction | None) -> int | None:
    """Return the value of an integer constant; None for anything else."""
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.operands[0]) if instruction.operands[0].isdigit() else None


def _index(instruction: Instruction | None) -> int | None:
    """Return the index of a get-tuple-element; None for anything else."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of KINDS
    bytes: int  # of the whole result on one device
    group: int  # devices that take part together; 0: all devices
    times: int  # how often one run of the program executes it
    attributes: str  # of its instruction, in HLO
    is_async: bool = False  # whether the program goes on while it is under way

    def sent(self, devices: int) -> int:
        """Return the bytes that one of `devices` sends each time, by ring algorithms."""
        n = self.group or devices
        if self.kind == "collective-permute":
            return self.bytes
        shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
        return round(self.bytes * shares.get(self.kind, (n - 1) / n))


def collectives(hlo_text: str) -> list[Collective]:
    """Return the collectives in the text of `compiled.as_text()`."""
    program = Program(hlo_text)
    found: list[Collective] = []
    steps_seen: set[tuple[str, str]] = set()
    started_apart = {  # computations that run beside the rest of the program
        called
        for _, instruction, _ in program.runs()
        if instruction.opcode == "async-start"
        for called in _called(instruction)
    }
    for name, instruction, times in program.runs():
        # Of a start and a done, the done has the result and the start the other attributes.
        kind, result = instruction.opcode.removesuffix("-done"), instruction.result
        if kind not in KINDS:
            continue
        instructions = program.computations[name]
        started = instructions.get(instruction.operands[0], instruction)
        source = started if instruction.opcode.endswith("-done") else instruction
        chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", instruction.attributes)
        if chain:  # one operation that several fusions each do a step of
            if (kind, chain[0]) in steps_seen:
                continue
            steps_seen.add((kind, chain[0]))
        if kind == "all-reduce" and "all-reduce-scatter" in name:
            # TPUs run this computation, in which each device then takes its shard, as one.
            kind = "reduce-scatter"
            result = next(one.result for one in instructions.values() if one.is_root)
        is_done = instruction.opcode.endswith("-done")
        is_async = bool(chain) or is_done or name in started_apart
        group = group_size(source.attributes)
        found.append(Collective(kind, nbytes(result), group, times, source.attributes, is_async))
    return found


def group_size(attributes: str) -> int:
    """Return the devices per group in an instruction's attributes; 0: all devices.

    XLA writes groups as lists, {{0,1},{2,3}}; as rows of an iota, [2,2]<=[4]T(1,0); or as axes of a
    mesh, mesh['a'=2,'b'=2] {'b'}, one of which may be a part of an axis: {'a':(1)2}.
    """
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if rows := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(rows[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if not mesh:
        return 0
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
