"""The pickle in a torch file, read as data by a machine that can run nothing.

Python's own unpickler calls whatever a file names. This one knows the few opcodes that torch.save
writes, and of names only those it is given. It does not know what a tensor is.
"""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.errors import UserError

MOST_STEPS = 500_000  # 10,000 tensors take half of them
LARGEST_KEY = 2**31  # dicts of larger whole numbers could be made slow on purpose


@dataclasses.dataclass(frozen=True)
class Function:
    """What a name in a pickle stands for if the pickle may call it."""

    call: Callable[..., Any]


def unpickle(
    data: bytes, names: Mapping[str, Any], persistent: Callable[[Any], Any], source: object
) -> Any:
    """The object in a pickle of protocol 2: dicts, lists, tuples, texts, numbers, and `names`.

    Args:
      names: by "module.name"; a `Function` may be called with arguments out of the pickle.
      persistent: makes an object of a persistent id, which may be anything.
      source: what an error calls the file.

    Raises:
      UserError: for any other name, and for a pickle that is damaged. Nothing has been run.
    """
    return _Machine(data, names, persistent, source).run()


class _Machine:
    def __init__(
        self, data: bytes, names: Mapping[str, Any], persistent: Callable, source: object
    ) -> None:
        self.data, self.position = data, 0
        self.names, self.persistent, self.source = names, persistent, source
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MOST_STEPS):
            opcode = self.take(1)
            if opcode == b".":
                return self.pop()
            if opcode not in ACTIONS:
                raise self.broken(f"opcode {opcode!r}")
            ACTIONS[opcode](self)
        raise self.broken(f"more than {MOST_STEPS:,} steps")

    def broken(self, what: str) -> UserError:
        where = f"{what} before byte {self.position:,} of data.pkl"
        return UserError(f"{self.source} is damaged or is no file of tensors: {where}")

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise self.broken("it ends early")
        return self.data[start : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 256)
        text = self.take(max(end - self.position, 0))
        self.take(1)
        return text.decode("utf-8", "replace")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise self.broken("nothing on the stack")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise self.broken(f"no {kind.__name__} to fill")
        return self.stack[-1]

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        if not self.below:
            raise self.broken("no mark")
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def text(self) -> None:
        try:
            self.push(self.take(self.number("<I")).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise self.broken("a text that is not UTF-8") from error

    def put(self, place: int) -> None:
        if not self.stack:
            raise self.broken("nothing on the stack")
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise self.broken("an object never stored")
        self.push(self.memo[place])

    def protocol(self) -> None:
        if (version := self.number("<B")) != 2:
            raise UserError(
                f"{self.source} is pickled with protocol {version}; save it again with"
                " torch.save's own, 2"
            )

    def name(self) -> None:
        name = f"{self.line()}.{self.line()}"
        if name not in self.names:
            raise UserError(
                f"{self.source} names {ascii(name)[1:-1]}, which no file of tensors needs and which"
                " could be harmful; nothing of it was run"
            )
        self.push(self.names[name])

    def call(self) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise self.broken("a call of what is no function")
        self.push(function.call(*arguments))

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise self.broken("a key without a value")
        for key, value in zip(items[::2], items[1::2]):
            if type(key) is not str and not (type(key) is int and 0 <= key < LARGEST_KEY):
                raise self.broken("a key that is no text")
            target[key] = value

    def build(self) -> None:
        """Attributes of an OrderedDict, such as the versions of a state_dict's modules: dropped."""
        self.pop()
        self.top(dict)


ACTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"c": _Machine.name,
    b"R": _Machine.call,
    b"b": _Machine.build,
    b"Q": lambda m: m.push(m.persistent(m.pop())),
    b"(": _Machine.mark,
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.since_mark())),
    b"\x85": lambda m: m.push(tuple(m.last(1))),
    b"\x86": lambda m: m.push(tuple(m.last(2))),
    b"\x87": lambda m: m.push(tuple(m.last(3))),
    b"s": lambda m: m.set_items(m.last(2)),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"a": lambda m: (item := m.pop(), m.top(list).append(item))[1],
    b"e": lambda m: (items := m.since_mark(), m.top(list).extend(items))[1],
    b"X": _Machine.text,
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"J": lambda m: m.push(m.number("<i")),
    b"G": lambda m: m.push(m.number(">d")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
}
