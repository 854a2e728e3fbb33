"""Iterators each of whose steps runs on a mesh, while their users keep their own.

A mesh is set for a thread; a generator that set it for its whole life would set it for whoever
asks for its next item too.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import Mesh

Arguments = ParamSpec("Arguments")
Item = TypeVar("Item")


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, arrays may be cut over the mesh; without one, nothing changes."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def steps_on_mesh(
    method: Callable[Arguments, Iterator[Item]],
) -> Callable[Arguments, Iterator[Item]]:
    """A generator method of an object with a `mesh`, run step by step with that mesh set."""

    @functools.wraps(method)
    def stepped(*arguments: Arguments.args, **options: Arguments.kwargs) -> Iterator[Item]:
        mesh = arguments[0].mesh  # type: ignore[attr-defined]
        steps = method(*arguments, **options)
        try:
            while True:
                with on_mesh(mesh):
                    try:
                        item = next(steps)
                    except StopIteration:
                        return
                yield item
        finally:
            with on_mesh(mesh):
                steps.close()  # type: ignore[attr-defined]

    return stepped
