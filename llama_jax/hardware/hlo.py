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

import numpy as np

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
    operands: tuple[str, ...]  # names; of a constant its value
    attributes: str  # the text after the operands
    is_root: bool


def arrays_of(result: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the (dtype, shape) of each array in a type such as "(f32[8,4]{1,0}, s32[])"."""
    found = []
    for match in _ARRAY.finditer(result):
        shape = tuple(int(size.lstrip(" <=")) for size in match[3].split(",") if size)
        found.append((match[0].split("[")[0], shape))
    return found


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an array; 0 for types without a width, such as a token."""
    bits = 8 if dtype == "pred" else int(next(iter(re.findall(r"\d+", dtype)), 0))
    return math.ceil(math.prod(shape) * bits / 8)


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
    operands = (inside,) if opcode[1] == "constant" else tuple(re.findall(r"%([\w.-]+)", inside))
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

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of KINDS
    dtypes: tuple[str, ...]  # of each array of the result, as XLA names them: "bf16"
    shapes: tuple[tuple[int, ...], ...]  # likewise, on one device
    bytes: int  # of the whole result on one device
    groups: Groups  # devices that take part together; empty: all devices
    times: int  # how often one run of the program executes it
    operation: str = ""  # `op_name` of its source

    @property
    def group(self) -> int:
        """Devices per group; 0: all devices."""
        return len(self.groups[0]) if self.groups else 0

    def sent(self, devices: int) -> int:
        """Return the bytes that one of `devices` sends each time, by ring algorithms."""
        n = self.group or devices
        if self.kind == "collective-permute":
            return self.bytes
        shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
        return round(self.bytes * shares.get(self.kind, (n - 1) / n))

    def axes(self, sizes: dict[str, int]) -> tuple[str, ...]:
        """Return the axes, of a mesh with these sizes, along which devices communicate."""
        members = self.groups or (tuple(range(math.prod(sizes.values()))),)
        crossed, inner = [], 1
        for name, size in reversed(sizes.items()):
            places = [{member // inner % size for member in group} for group in members]
            inner *= size
            crossed += [name] if any(len(place) > 1 for place in places) else []
        return tuple(reversed(crossed))


def collectives(hlo_text: str) -> list[Collective]:
    """Return the collectives in the text of `compiled.as_text()`."""
    program = Program(hlo_text)
    fused = _reduce_scatters(program)
    found: list[Collective] = []
    parts_seen: set[tuple[str, str]] = set()
    for name, instruction, times in program.runs():
        kind = _kind(instruction)
        if kind is None:
            continue
        chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", instruction.attributes)
        if chain:  # one operation that several fusions each do a step of
            part = (kind, chain[0])
            if part in parts_seen:
                continue
            parts_seen.add(part)
        started = program.computations[name].get(instruction.operands[0], instruction)
        source = started if instruction.opcode.endswith("-done") else instruction
        result = instruction.result
        if name in fused and kind == "all-reduce":
            kind, result = "reduce-scatter", fused[name]
        found.append(_collective(kind, result, source, times))
    return found


def _kind(instruction: Instruction) -> str | None:
    """Return which collective an instruction is, or None.

    Of a start and a done it is the done, which has the result.
    """
    opcode = instruction.opcode.removesuffix("-done")
    return opcode if opcode in KINDS else None


def _reduce_scatters(program: Program) -> dict[str, str]:
    """Return the computations that TPUs run as a reduce-scatter, with their result types.

    In the text they are an all-reduce of which each device then takes its shard.
    """
    found = {}
    for name, instructions in program.computations.items():
        if "all-reduce-scatter" in name:
            root = next(i for i in instructions.values() if i.is_root)
            found[name] = root.result
    return found


def _collective(kind: str, result: str, source: Instruction, times: int) -> Collective:
    arrays = arrays_of(result)
    operation = re.search(r'op_name="([^"]*)"', source.attributes)
    return Collective(
        kind=kind,
        dtypes=tuple(dtype for dtype, _ in arrays),
        shapes=tuple(shape for _, shape in arrays),
        bytes=sum(bytes_of(dtype, shape) for dtype, shape in arrays),
        groups=device_groups(source.attributes),
        times=times,
        operation=operation[1] if operation else "",
    )


def device_groups(attributes: str) -> Groups:
    """Return the groups of devices in an instruction's attributes, in any of XLA's notations.

    Lists, {{0,1},{2,3}}; rows of a transposed iota, [2,2]<=[4]T(1,0); or axes of a mesh,
    mesh['a'=2,'b'=2] {'b'}, one of which may be a part of an axis: {'a':(1)2}.
    """
    if listed := re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes
    ):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if rows := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[^ ]*)", attributes):
        return _rows(_iota(rows[3]).reshape(int(rows[1]), int(rows[2])))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if not mesh:
        return ()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    return _along_axes(sizes, mesh[2], re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3]))


def _iota(text: str) -> np.ndarray:
    """Return the numbers of a transposed iota such as "[2,4]T(1,0)", flattened."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?.*", text).groups()  # type: ignore[union-attr]
    sizes = [int(size) for size in shape.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(axis) for axis in order.split(",")] if order else None).ravel()


def _along_axes(
    sizes: dict[str, int], order: str | None, axes: list[tuple[str, str, str]]
) -> Groups:
    """Return the groups along some axes of a mesh; `order`: its device ids if not 0, 1, …"""
    dims: list[int] = []
    along: list[int] = []
    for name, size in sizes.items():
        parts = {name: size}
        split = next(((int(a), int(b)) for axis, a, b in axes if axis == name and b), None)
        if split:  # the middle of an axis seen as [before, part, after]
            parts = {"": split[0], name: split[1], " ": size // (split[0] * split[1])}
        for part, length in parts.items():
            along += [len(dims)] if part in {axis for axis, _, _ in axes} else []
            dims.append(length)
    devices = np.arange(math.prod(dims))
    if order:
        listed = re.fullmatch(r"[\d,]+", order)
        devices = np.array([*map(int, order.split(","))]) if listed else _iota(order)
    placed = np.moveaxis(devices.reshape(dims), along, range(-len(along), 0))
    return _rows(placed.reshape(-1, math.prod(dims[axis] for axis in along)))


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(map(int, group)) for group in groups)
