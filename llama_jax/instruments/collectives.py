"""What a compiled program sends between devices, read from its text.

A collective inside a loop counts as often as the loop goes round, so that the sums are those of one
run. Asynchronous ones, split into a start and an end, count once, and so does what TPUs do a part
at a time beside other work. Does not know what takes how long.
"""

import dataclasses
import math
import re

import numpy as np

from llama_jax.instruments.hlo import Instruction, Program, arrays_of, bytes_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # one of KINDS
    dtypes: tuple[str, ...]  # of each array of the result, as XLA names them: "bf16"
    shapes: tuple[tuple[int, ...], ...]  # of each array of the result on one device
    bytes: int  # of the whole result on one device
    groups: Groups  # which devices exchange; empty: all of them with each other
    times: int  # how often one run of the program does it
    operation: str = ""  # what in the source it comes from, as XLA noted

    @property
    def group(self) -> int:
        """Devices that exchange with each other; 0: all that there are."""
        return len(self.groups[0]) if self.groups else 0

    def sent(self, devices: int) -> int:
        """Bytes that one of `devices` sends each time, if all went round in a ring."""
        n = self.group or devices
        if self.kind == "collective-permute":
            return self.bytes
        shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1}
        return round(self.bytes * shares.get(self.kind, (n - 1) / n))

    def axes(self, sizes: dict[str, int]) -> tuple[str, ...]:
        """The axes, of a mesh with these sizes, that it crosses."""
        members = self.groups or (tuple(range(math.prod(sizes.values()))),)
        crossed, inner = [], 1
        for name, size in reversed(sizes.items()):
            places = [{member // inner % size for member in group} for group in members]
            inner *= size
            crossed += [name] if any(len(place) > 1 for place in places) else []
        return tuple(reversed(crossed))


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of a program given as the text of `compiled.as_text()`."""
    program = Program(hlo_text)
    fused = _reduce_scatters(program)
    found: list[Collective] = []
    parts_seen: set[tuple[str, str]] = set()
    for name, instruction, times in program.runs():
        kind = _kind(instruction)
        if kind is None:
            continue
        chain = re.search(r"channel_id=\d+.*chain_id=\"\d+\"", instruction.attributes)
        if chain:  # one operation that several fusions each do a part of
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
    """Which collective an instruction is; of a start and an end, the end, which has the result."""
    opcode = instruction.opcode.removesuffix("-done")
    return opcode if opcode in KINDS else None


def _reduce_scatters(program: Program) -> dict[str, str]:
    """The computations that TPUs run as a reduce-scatter, with the type of their result.

    They read as an all-reduce of which each device then takes its part.
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
    """The groups of devices in an instruction's attributes, in any of XLA's notations.

    They are listed, {{0,1},{2,3}}; or rows of a transposed count, [2,2]<=[4]T(1,0); or axes of a
    mesh, mesh['a'=2,'b'=2] {'b'}, of which one may be split in parts: {'a':(1)2}.
    """
    if listed := re.search(
        r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes
    ):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    if rows := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[^ ]*)", attributes):
        return _rows(_counted(rows[3]).reshape(int(rows[1]), int(rows[2])))
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes
    )
    if not mesh:
        return ()
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    return _along_axes(sizes, mesh[2], re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3]))


def _counted(text: str) -> np.ndarray:
    """The numbers from 0 that "[2,4]T(1,0)" counts through, in one row."""
    shape, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\)?)?.*", text).groups()  # type: ignore[union-attr]
    sizes = [int(size) for size in shape.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(axis) for axis in order.split(",")] if order else None).ravel()


def _along_axes(
    sizes: dict[str, int], order: str | None, axes: list[tuple[str, str, str]]
) -> Groups:
    """Groups along some axes of a mesh; `order`: which devices its places are, if not 0, 1, …"""
    dims: list[int] = []
    along: list[int] = []
    for name, size in sizes.items():
        parts = {name: size}
        cut = next(((int(a), int(b)) for axis, a, b in axes if axis == name and b), None)
        if cut:  # of an axis seen as [before, part, after] the part
            parts = {"": cut[0], name: cut[1], " ": size // (cut[0] * cut[1])}
        for part, length in parts.items():
            along += [len(dims)] if part in {axis for axis, _, _ in axes} else []
            dims.append(length)
    devices = np.arange(math.prod(dims))
    if order:
        listed = re.fullmatch(r"[\d,]+", order)
        devices = np.array([*map(int, order.split(","))]) if listed else _counted(order)
    placed = np.moveaxis(devices.reshape(dims), along, range(-len(along), 0))
    return _rows(placed.reshape(-1, math.prod(dims[axis] for axis in along)))


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(map(int, group)) for group in groups)
