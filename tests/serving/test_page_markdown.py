"""The chat page: what a model writes, as elements, and never run."""

import re
import time

import pytest
from page_driver import act, open_messages, say

pytestmark = pytest.mark.page


def test_what_a_model_writes_is_never_run(page):
    say(page, "attack")
    page.wait_for_timeout(200)
    assert page.evaluate("window.attacked") is None
    body = page.locator(".message.assistant .body")
    assert body.locator("script, img, iframe, svg:not(button svg), style, [onerror]").count() == 0
    links = body.locator("a").evaluate_all("links => links.map((a) => [a.href, a.rel, a.target])")
    assert {target[0].split(":")[0] for target in links} == {"https"}
    assert {tuple(each[1:]) for each in links} == {("noopener noreferrer", "_blank")}
    assert "<script>window.attacked" in body.inner_text()
    page.reload()
    page.wait_for_selector(".message")
    assert page.evaluate("window.attacked") is None


def test_markdown_becomes_elements(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    say(page, "markdown")
    body = page.locator(".message.assistant .body")
    for selector, text in {
        "h3": "Heading",
        "p >> nth=0": "Some bold, italic, struck and code, with snake_case_names and 2 * 3 * 4.",
        "strong >> nth=0": "bold",
        "em": "italic",
        "del": "struck",
        "p code": "code",
        "ol > li > ul > li > p > strong": "item",
        "ol > li:nth-child(2) > p >> nth=-1": "still two",
        "ol > li:nth-child(3)": "three",
        "blockquote": "quoted",
        "pre code": "def add(a, b):\n    return a + b  # <b>",
        "th:nth-child(2)": "right",
        "td:nth-child(2)": "2",
        "a": "https://example.org/a_b_c",
        ":scope > p >> nth=-1": "See https://example.org/a_b_c. Unclosed **bold and `code",
    }.items():
        assert body.locator(selector).inner_text() == text
    page.get_by_role("button", name="Copy the code").click()
    copied = "navigator.clipboard.readText()"
    assert page.evaluate(copied) == "def add(a, b):\n    return a + b  # <b>"
    act(page, "Copy")
    assert page.evaluate(copied).startswith("# Heading\n\nSome **bold**")


MARKDOWN = {  # texts, and the elements that they become, without attributes and code's headers
    "1. a\n```sh\nx\n```\n2. b\n   c\n\n   d": "<ol><li><p>a</p></li></ol>"
    "<div><pre><code>x</code></pre></div><ol><li><p>b<br>c</p><p>d</p></li></ol>",
    "1. a\n    - b\n        - c\n    - d\n2. e": "<ol><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p>"
    "</li></ul></li><li><p>d</p></li></ul></li><li><p>e</p></li></ol>",
    "- a\n\n- b\n\nc": "<ul><li><p>a</p></li><li><p>b</p></li></ul><p>c</p>",
    "1. a\n- [x] b": "<ol><li><p>a</p></li></ol><ul><li><p>☑ b</p></li></ul>",
    "***a*** **b *c* d** *e **f** g*": "<p><strong><em>a</em></strong> "
    "<strong>b <em>c</em> d</strong> <em>e <strong>f</strong> g</em></p>",
    "x_1 + x_2, 2 * 3, **a ** and \\*b\\*": "<p>x_1 + x_2, 2 * 3, **a ** and *b*</p>",
    "`` a ` b `` and `*c*`": "<p><code>a ` b</code> and <code>*c*</code></p>",
    "a|b\n-|-\n1|2 \\| 3\n\nc": "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
    "<tbody><tr><td>1</td><td>2 | 3</td></tr></tbody></table></div><p>c</p>",
    "[a](https://b.c/d_(e)) [f][g] <http://h.i>": "<p><a>a</a> [f][g] <a>http://h.i</a></p>",
    "> a\n> - b\n\n> c": "<blockquote><p>a</p><ul><li><p>b</p></li></ul></blockquote>"
    "<blockquote><p>c</p></blockquote>",
    "# a\n---\n~~~\n```\n~~~": "<h3>a</h3><hr><div><pre><code>```</code></pre></div>",
    "- a\n  ```\n  b\n\n    c\n  ```": "<ul><li><p>a</p><div><pre><code>b\n\n  c</code></pre></div>"
    "</li></ul>",
}


def test_markdown_of_many_kinds(page):
    open_messages(page, MARKDOWN)
    bodies = page.locator(".body").evaluate_all("nodes => nodes.map((node) => node.innerHTML)")
    bare = [
        re.sub(r"<header>.*?</header>", "", re.sub(r"<(\w+) [^>]*>", r"<\1>", each))
        for each in bodies
    ]
    assert dict(zip(MARKDOWN, bare)) == MARKDOWN


def test_hostile_markdown_takes_no_time(page):
    """Deep nesting and marks that never close: linear or nearly so."""
    hostile = [
        "> " * 5000,
        "- " * 5000,
        "**a" * 10000,
        "`" * 9999 + "a",
        "[" * 10000,
        "[a](" * 9999,
    ]
    hostile += [
        "_a *b " * 5000,
        "|" * 9999 + "\n" + "|-" * 5000,
        "    - a\n" * 3000,
        "<http" * 9999,
    ]
    start = time.monotonic()
    open_messages(page, hostile)
    assert time.monotonic() - start < 5
