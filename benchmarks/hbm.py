"""Bytes that a program for a TPU reads from and writes to HBM, from its optimized text.

Arrays in the chip's own memory (VMEM) are marked there, and cost nothing; what a fusion slices, or
updates in place, costs the slice. Each instruction counts as often as it runs, a loop whose turns
depend on data once. A kernel of Pallas counts its operands and results once.
"""

import re

from llama_jax.hardware.hlo import Instruction, Program, nbytes

# They move nothing; of what runs beside the program, the start is counted.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
FREE |= {"call", "copy-done", "slice-done"}
SLICES = {"dynamic-slice", "slice", "gather"}
Computation = dict[str, Instruction]


def hbm_bytes(program: Program) -> int:
    """Return the bytes of one run of a program."""
    instructions = list(program.runs())
    inside = {
        called
        for _, one, _ in instructions
        if one.opcode not in ("while", "conditional", "call")
        for called in re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", one.attributes)
    }
    return sum(
        _moved(program, program.computations[name], one) * times
        for name, one, times in instructions
        if name not in inside
    )


def _moved(program: Program, around: Computation, one: Instruction) -> int:
    """Return the bytes that an instruction moves, `around` being the computation it is in."""
    results = _arrays(one.result)
    if one.opcode in FREE:
        return 0
    if one.opcode == "copy-start":  # (to, from, context)
        return sum(nbytes(array) for array in results[:2] if _in_hbm(array))
    if one.opcode == "slice-start":  # ((from), to, context)
        return nbytes(results[1]) * (1 + _in_hbm(results[1]))
    fused = _called(program, one)
    total = 0
    for place, name in enumerate(one.operands):
        if _in_hbm(around[name].result):
            updated = one.opcode == "dynamic-update-slice" and place == 0
            total += 0 if updated else _read(program, fused, place, around[name])
    roots = _roots(fused) if fused else [one]
    if len(roots) < len(results):  # such as one all-reduce of several arrays
        return total + sum(nbytes(array) for array in results if _in_hbm(array))
    for array, root in zip(results, roots, strict=True):
        if _in_hbm(array):
            total += _written(fused or around, root)
    return total


def _read(program: Program, fused: Computation | None, place: int, operand: Instruction) -> int:
    """Return the bytes that are read of an operand: of what a fusion slices, the slices."""
    if fused is None:
        return nbytes(operand.result)
    given = (one for one in fused.values() if one.opcode == "parameter")
    parameter = next(one for one in given if one.operands == (str(place),))
    return _used(program, fused, parameter)


def _used(program: Program, fused: Computation, value: Instruction) -> int:
    """Return the bytes of a value that the rest of a fusion needs."""
    whole = nbytes(value.result)
    total = whole if value.is_root else 0
    for user in fused.values():
        if value.name not in user.operands or user.opcode in ("constant", "parameter"):
            continue
        place = user.operands.index(value.name)
        if user.opcode in SLICES:
            total += nbytes(user.result)
        elif user.opcode == "bitcast":
            total += _used(program, fused, user)
        elif user.opcode == "fusion":
            inside = _read(program, _called(program, user), place, value)
            total += _used(program, fused, user) if inside == whole else inside
        elif user.opcode != "dynamic-update-slice" or place:
            total += whole
    return min(total, whole)


def _written(around: Computation, root: Instruction) -> int:
    while root.opcode == "bitcast":
        root = around[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return nbytes(around[root.operands[1]].result)
    return nbytes(root.result)


def _roots(fused: Computation) -> list[Instruction]:
    root = next(one for one in fused.values() if one.is_root)
    return [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _called(program: Program, one: Instruction) -> Computation | None:
    """Return the computation of a fusion; None for another instruction."""
    called = re.search(r"\bcalls=%?([\w.-]+)", one.attributes)
    return program.computations[called[1]] if one.opcode == "fusion" and called else None


def _arrays(result: str) -> list[str]:
    """Return the array types in a type."""
    return re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", result)


def _in_hbm(array: str) -> bool:
    """Return whether an array is in HBM: other memories have a number in its layout."""
    return re.search(r"S\(\d+\)", array) is None
