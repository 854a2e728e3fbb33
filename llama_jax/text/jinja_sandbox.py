"""A sandbox for Jinja templates, with limits of time and size.

A template is a program of a stranger. Jinja's sandbox keeps it from everything but its variables;
the limits here keep it from running for ever and from filling the memory.
"""

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import do_sum
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from llama_jax.errors import UserError, first_line

MAX_SOURCE = 2**18  # characters; Llama 3.1's with its tools has 3,800
MAX_TEXT = 2**22  # characters of any value; an item of a collection counts as 8
MAX_NUMBER = 10**6  # of an argument, such as the width of a column
MAX_WORK = 2**30  # product of the sizes and numbers that a function combines
NESTED_FIELD = re.compile(r"\{[^{}]*:[^{}]*\{")  # whose width is a value
WIDE_FIELD = re.compile(r"[0-9]{7,}|%[-+ #0]*[*]")  # in a format string, or for one


class _Refused(jinja2.TemplateError):
    """A template called `raise_exception`."""


class _TooMuch(jinja2.TemplateError):
    """A template exceeds a limit."""


class _Generation(Extension):
    """The block `{% generation %}`, with which transformers finds the assistant's tokens."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Limited(NodeTransformer):
    """Routes loops, collections and the operator ~ through filters that observe the limits."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return _filtered(_filtered(parts, "_bounded"), "join")

    def visit_List(self, node: Any) -> nodes.Filter:
        """Limit collections, which could double in each pass of a loop, when they are made."""
        return _filtered(self.generic_visit(node), "_bounded")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_bounded") if node.ctx == "load" else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox as transformers sets it up, with limits of time and size."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, seconds: float) -> None:
        extensions = ("jinja2.ext.loopcontrols", _Generation)
        # Without the optimizer, which would compute constants such as "a" * 10**9.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False
        )
        self._seconds, self._threads = seconds, threading.local()
        self.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        self.globals |= {"namespace": _Namespace, "dict": _make_dict}
        del self.globals["lipsum"]  # texts of any length
        self.filters |= {"tojson": _to_json, "format": _format, "sum": _sum}
        self.filters = {name: self._limited(each) for name, each in self.filters.items()}
        self.filters |= {"_counted": self._counted, "_bounded": self._bounded}

    def compile_template(self, source: str) -> jinja2.Template:
        """Compile a source so that its loops and texts observe the limits.

        Raises:
          UserError: if it is not a template.
        """
        if len(source) > MAX_SOURCE:
            raise UserError(
                f"the chat template has {len(source):,} characters; expected at most {MAX_SOURCE:,}"
            )
        try:
            tree = _Limited().visit(self.parse(source))
            code = self.compile(tree)
            return jinja2.Template.from_code(self, code, self.make_globals(None))
        except jinja2.TemplateSyntaxError as error:
            line = f"line {error.lineno}: {first_line(error)}"
            raise UserError(f"the chat template does not parse: {line}") from error
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise UserError(f"the chat template does not compile: {first_line(error)}") from error

    def render_bounded(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Return what a template renders; errors as for `JinjaTemplate.render`."""
        self._threads.end = time.monotonic() + self._seconds
        try:
            return template.render(variables)
        except _Refused as error:
            raise UserError(f"the chat template refuses the dialogue: {error}") from error
        except (_TooMuch, MemoryError, OverflowError, RecursionError) as error:
            reason = first_line(error)
            raise UserError(f"the chat template does too much work: {reason}") from error
        except SecurityError as error:
            reason = first_line(error)
            raise UserError(f"the chat template does what is forbidden: {reason}") from error
        except Exception as error:  # what a stranger's program may raise
            raise UserError(f"the chat template fails: {first_line(error)}") from error

    def call(self, *args: Any, **kwargs: Any) -> Any:
        context, function, *others = args
        owner = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        values = [*others, *kwargs.values()]
        if isinstance(owner, str) and function.__name__ in ("format", "format_map"):
            widths = values if NESTED_FIELD.search(owner) else []
            _check_fields(owner, *(each for each in widths if isinstance(each, str)))
        self._check(owner, *values)
        return self._bounded(super().call(context, function, *others, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._check()
        if operator in ("*", "**"):
            self._check(*(each for each in (left, right) if isinstance(each, int)))
            sizes = [len(each) if isinstance(each, Sized) else each for each in (left, right)]
            if sizes != [left, right] and math.prod(sizes) > MAX_TEXT:
                raise _TooMuch(f"a text of {math.prod(sizes):,} characters")
            if operator == "**" and abs(right) > 64:
                raise _TooMuch(f"a power of {right:,}")
        if operator == "%" and isinstance(left, str):
            _check_fields(left)
            self._check(left, [right])
        return self._bounded(super().call_binop(context, operator, left, right))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Return what the parts of a template wrote."""
        kept, size = [], 0
        for part in parts:
            kept.append(part)
            size += len(part)
            if size > MAX_TEXT:
                raise _TooMuch(f"a text of more than {MAX_TEXT:,} characters")
        return "".join(kept)

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # also copies that it takes the environment, or a context
        def limited(*args: Any, **kwargs: Any) -> Any:
            values = [each for each in args if not hasattr(each, "environment") and each != self]
            self._check(*values, *kwargs.values())
            return self._bounded(function(*args, **kwargs))

        return limited

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._check()
            yield value

    def _check(self, *values: Any) -> None:
        """Refuse more work after the time, or on such values."""
        if time.monotonic() > self._threads.end:
            raise _TooMuch(f"it takes more than {self._seconds:g} seconds")
        if math.prod(map(_weight, values)) > MAX_WORK:
            raise _TooMuch("its texts are too long")
        for value in values:
            if isinstance(value, int) and abs(value) > MAX_NUMBER:
                raise _TooMuch(f"a number of {value:,}")

    def _bounded(self, value: Any) -> Any:
        if isinstance(value, Sized) and (size := _weight(value)) > MAX_TEXT:
            raise _TooMuch(f"a text of {size:,} characters")
        return value


def _weight(value: Any) -> int:
    """Return a number, or the length of a text, or of all that a collection holds; at least 1."""
    if isinstance(value, int):
        return max(abs(value), 1)
    size, waiting = 0, [value]
    while waiting and size <= MAX_WORK:
        each = waiting.pop()
        if isinstance(each, dict):
            each = [*each.keys(), *each.values()]
        if isinstance(each, list | tuple):
            waiting += each
            size += 8 * len(each)
        elif isinstance(each, Sized):
            size += len(each)
    return max(size, 1)


def _check_fields(*texts: str) -> None:
    """Refuse format strings, or widths for one, that could make a text of any length."""
    if any(WIDE_FIELD.search(text) for text in texts):
        raise _TooMuch("a field of millions of characters")


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    """Return a value formatted by the operator %, as Jinja's own filter of this name."""
    _check_fields(str(value))
    return str(value) % (kwargs or args)


@jinja2.pass_environment
def _sum(environment: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Return the sum of numbers, by Jinja's own filter; one of lists would take for ever."""
    if not isinstance(start, int | float):
        raise _TooMuch("a sum of collections")
    return do_sum(environment, values, attribute, start)


def _refuse(message: str) -> None:
    raise _Refused(str(message))


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class _Namespace(jinja2.utils.Namespace):
    """Variables that a template sets in a loop; not `__call__`, which Jinja would obey."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no name such as {name!r}")
        super().__setitem__(name, value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(value: Any, **options: Any) -> str:
    """Return JSON without HTML escapes, which Jinja's own filter of this name makes."""
    return json.dumps(value, **{"ensure_ascii": False} | options)
