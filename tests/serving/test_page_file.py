"""The file of the chat page: what it may hold."""

import html.parser
import re
import tomllib

import pytest
from page_driver import PAGE


@pytest.fixture(scope="module")
def source():
    return PAGE.read_text(encoding="utf-8")


def test_no_resource_comes_from_elsewhere(source):
    addresses = set(re.findall(r"https?://[\w.]+[^\s'\"]*", source))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of the namespace
    assert not re.search(r"@import|url\(|<link(?! rel=\"icon\" href=\"data:)|srcset", source)
    assert not re.search(r"(?<!href)=[\"']//", source)


def test_nothing_parses_or_runs_text(source):
    traps = "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( DOMParser srcdoc"
    traps += ' setHTMLUnsafe createContextualFragment setTimeout("'
    assert [trap for trap in traps.split() if trap in source] == []
    assert not re.search(r"\son\w+=[\"']", source)  # handlers in HTML, which the policy forbids


def test_the_file_is_small_and_well_formed(source):
    empty = {"meta", "link", "input"}
    opened, ids = [], []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            ids.extend(value for name, value in attributes if name == "id")
            if tag not in empty:
                opened.append(tag)

        def handle_startendtag(self, tag, attributes):
            ids.extend(value for name, value in attributes if name == "id")

        def handle_endtag(self, tag):
            assert opened.pop() == tag, self.getpos()

    parser = Parser()
    parser.feed(source)
    assert opened == []
    assert len(ids) == len(set(ids))
    for name in re.findall(r'\$\("([\w-]+)"\)', source) + re.findall(r'"#(icon-[\w-]+)"', source):
        assert name in ids
    assert len(source.encode()) < 90_000


def test_the_package_contains_the_page():
    project = tomllib.loads((PAGE.parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["llama_jax.serving"]
    assert any(PAGE.relative_to(PAGE.parents[1]).match(pattern) for pattern in patterns)
