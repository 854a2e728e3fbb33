"""The mesh axes along which the devices of a compiled collective communicate."""

import math
import re

import numpy as np


def axes_of(collective, sizes):
    """Return the names of the axes of a mesh with these sizes, in their order."""
    shape = tuple(sizes.values())
    groups = _groups(collective.attributes, np.arange(math.prod(shape)))
    places = [np.unravel_index(group, shape) for group in groups]
    return tuple(
        name
        for axis, name in enumerate(sizes)
        if any(len(set(place[axis].tolist())) > 1 for place in places)
    )


def _groups(text, devices):
    """Return the groups of devices, [groups, devices], as XLA writes them on CPU."""
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
        return [[*map(int, ids.split(","))] for ids in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        rows, shape, order = (part and [*map(int, part.split(","))] for part in iota.groups())
        return devices.reshape(shape).transpose(order).reshape(rows)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        if order := re.search(r"device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\)", text):
            shape, axes = ([*map(int, part.split(","))] for part in order.groups())
            devices = devices.reshape(shape).transpose(axes)
        along = {axis: part for axis, *part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[2])}
        dims = []
        for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1]):
            before, part = along.get(name, (size, 1))  # of an axis as [before, part, after]
            before, part = int(before or 1), int(part or size)
            dims += [before, part, int(size) // (before * part)]
        parts = range(1, len(dims), 3)
        moved = np.moveaxis(devices.reshape(dims), parts, range(-len(parts), 0))
        return moved.reshape(-1, math.prod(dims[1::3]))
    assert "replica_groups={}" in text, text
    return [devices]
