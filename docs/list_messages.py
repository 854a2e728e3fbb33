"""List the messages that a user can cause, each with its place: python docs/list_messages.py

These are the texts given to `UserError` and its kinds, to `warn`, and to functions that pass a text
of their caller on to one of them, such as `require`. Values appear in braces.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "message",
    "what",
    "why",
    "expected",
    "problem",
}  # parameters that become part of a message


def called_name(call: ast.Call) -> str:
    """Return the last name of what is called: `damaged` of `layout.damaged(...)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def calls(tree: ast.AST, names: set[str]) -> Iterator[ast.Call]:
    """Yield the calls of these names."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return (node for node in nodes if called_name(node) in names)


def find_reporters(trees: list[ast.Module]) -> set[str]:
    """Return the names of the errors, and of what makes one of a text that its caller gives."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found, size = {"UserError", "warn"}, 0
    while size != len(found):
        size = len(found)
        for node in nodes:
            if isinstance(node, ast.ClassDef) and found & {ast.unparse(b) for b in node.bases}:
                found.add(node.name)
            if isinstance(node, ast.FunctionDef):
                texts = TEXTS & {
                    argument.arg
                    for argument in ast.walk(node.args)
                    if isinstance(argument, ast.arg)
                }
                used = {
                    name.id
                    for call in calls(node, found)
                    for name in ast.walk(call)
                    if isinstance(name, ast.Name)
                }
                found |= {node.name} if texts & used else set()
    return found


def text_of(node: ast.AST, values: dict[str, list[ast.AST]]) -> str:
    """Return the text that an expression stands for, "" if it is none.

    Args:
      values: what the names of the function around it are assigned.
    """
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(text_of(part, {}) for part in parts)
        case ast.FormattedValue(value=value):
            return f"{{{ast.unparse(value)}}}"
        case ast.BinOp(left=left, right=right):
            return text_of(left, values) + text_of(right, values)
        case ast.IfExp(body=body, orelse=other):
            return f"({text_of(body, values)} | {text_of(other, values)})"
        case ast.Name(id=name) if name in values:
            found = [text_of(value, {}) for value in values[name]]
            return " | ".join(filter(None, found))
    return ""


def messages(tree: ast.Module, reporters: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and text of each message of a module."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        values: dict[str, list[ast.AST]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values.setdefault(node.targets[0].id, []).append(node.value)
        for call in calls(function, reporters):
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            texts = [text_of(argument, values) for argument in arguments]
            if any(" " in text for text in texts):  # a single word is a name, not a sentence
                yield call.lineno, "; ".join(filter(None, texts))


def list_messages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield place and text of each message of a package."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}
    reporters = find_reporters(list(trees.values()))
    for path, tree in trees.items():
        for line, text in sorted(set(messages(tree, reporters))):
            yield f"{path.relative_to(folder)}:{line}", text


if __name__ == "__main__":
    for place, text in list_messages(ROOT / "llama_jax"):
        print(f"{place}: {text}")
