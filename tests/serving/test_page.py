"""The chat page: what its file may hold, and how it behaves in a browser."""

import html.parser
import json
import re
import shutil
import time
import tomllib
from pathlib import Path

import pytest

import llama_jax

PAGE = Path(llama_jax.__file__).parent / "serving" / "page" / "index.html"
NAMES = ("chromium", "google-chrome")  # as Debian and GitHub's runners call it
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
in_browser = pytest.mark.page


# ---- the file ----


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


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium; install it with: apt install chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("uvicorn")
    from fake_server import FakeServer

    with FakeServer() as running:
        yield running


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a browser without history; it must raise and log no error."""
    contexts, problems, outside = [], [], []

    def opened(url=server.url, script="", **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 700}, **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if is_problem(line) else None)
        page.on("request", lambda request: outside.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(url)
        page.wait_for_selector("#model option, .notice, dialog[open]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in outside if not url.startswith(("http://127.0.0.1:", "blob:"))] == []


def is_problem(line):
    return line.type == "error" and "Failed to load resource" not in line.text


@pytest.fixture
def page(open_page):
    return open_page()


def say(page, text, wait=True):
    page.fill("#draft", text)
    page.press("#draft", "Enter")
    if wait:
        finished(page)


def finished(page):
    page.wait_for_selector("#send:not([hidden])")


def appears(page, text):
    page.locator(".message .body", has_text=text).first.wait_for()


def texts(page, selector=".message .body"):
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def act(page, name, place=-1):
    """Press a button of a message, by its name."""
    item = page.locator("#messages > li")
    item.nth(place % item.count()).get_by_role("button", name=name, exact=True).click()


def titles(page):
    return page.locator("#conversations a").all_inner_texts()


def open_chat(page, title):
    page.get_by_role("link", name=title).click()
    page.locator("#conversations .open", has_text=title).wait_for()


@in_browser
def test_a_message_is_sent_and_answered(page, server):
    say(page, "Hello there")
    assert texts(page) == ["Hello there", "You said: Hello there"]
    sent = server.requests[-1]
    assert sent["messages"] == [{"role": "user", "content": "Hello there"}]
    assert sent["model"] == "tiny-chat" and sent["stream_options"] == {"include_usage": True}
    assert (sent["temperature"], sent["max_tokens"]) == (0.7, 512)
    assert page.inner_text("#speed") == "41.5 tokens/s · 4 tokens · first after 0.12 s"
    assert re.fullmatch(r"\d+ of 2,048 tokens", page.inner_text("#context"))
    assert page.inner_text("#announcer") == "You said: Hello there"
    say(page, "And again")
    roles = [message["role"] for message in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


@in_browser
def test_an_answer_appears_while_it_is_written_and_stops(page, server):
    cancelled = server.cancelled
    say(page, "slow", wait=False)
    appears(page, "word5 ")
    assert "word390" not in page.inner_text("#messages")
    page.click("#stop")
    finished(page)
    kept = texts(page)[-1]
    assert kept.startswith("word0 word1 ") and "Stopped" in page.inner_text("#messages")
    deadline = time.monotonic() + 2
    while server.cancelled == cancelled and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert server.cancelled == cancelled + 1  # the server notices, and its slot is free
    assert page.evaluate("document.activeElement.id") == "draft"
    act(page, "Continue")
    finished(page)
    assert texts(page)[-1] == kept + " and so on."
    assert server.requests[-1]["continue_final_message"] is True
    assert server.requests[-1]["messages"][-1]["role"] == "assistant"


@in_browser
def test_escape_stops(page):
    say(page, "slow", wait=False)
    appears(page, "word3 ")
    page.keyboard.press("Escape")
    finished(page)
    assert "word390" not in page.inner_text("#messages")


@in_browser
def test_an_answer_is_replaced_and_brought_back(page, server):
    say(page, "one")
    say(page, "two")
    seed = server.requests[-1]["seed"]
    act(page, "Answer again", 1)
    finished(page)
    assert texts(page) == ["one", "You said: one"]
    assert server.requests[-1]["seed"] != seed
    page.get_by_role("button", name="Undo").click()
    assert texts(page) == ["one", "You said: one", "two", "You said: two"]


@in_browser
def test_an_answer_being_written_is_replaced_and_brought_back(page):
    say(page, "one")
    say(page, "slow", wait=False)
    appears(page, "word3 ")
    act(page, "Answer again", 1)
    appears(page, "You said: one")
    page.wait_for_timeout(300)  # the answer that was cut off leaves nothing behind
    assert texts(page) == ["one", "You said: one"]
    page.get_by_role("button", name="Undo").click()
    assert texts(page)[2] == "slow" and texts(page)[3].startswith("word0 word1")
    page.reload()
    page.wait_for_selector(".message")
    assert len(texts(page)) == 4


@in_browser
def test_an_answer_being_written_is_asked_for_again(page):
    say(page, "slow", wait=False)
    appears(page, "word3 ")
    page.keyboard.press("Alt+KeyR")
    page.wait_for_timeout(300)  # the end of the first does not pass for that of the second
    assert page.is_visible("#stop") and len(texts(page)) == 2
    page.keyboard.press("Escape")
    finished(page)


@in_browser
def test_a_chat_deleted_while_it_is_written_stays_deleted(page):
    say(page, "slow", wait=False)
    appears(page, "word3 ")
    page.get_by_role("button", name="Options for slow").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_timeout(300)
    assert titles(page) == []
    page.reload()
    page.wait_for_selector("#welcome:not([hidden])")
    assert titles(page) == []


@in_browser
def test_messages_are_edited_in_place(page, server):
    say(page, "one")
    say(page, "two")
    act(page, "Edit", 1)
    page.get_by_label("Edit the message").fill("I changed this")
    page.get_by_role("button", name="Save", exact=True).click()
    assert texts(page) == ["one", "I changed this", "two", "You said: two"]
    act(page, "Edit", 0)
    page.get_by_label("Edit the message").fill("first")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert texts(page) == ["first", "You said: first"]
    act(page, "Edit", 1)
    page.get_by_label("Edit the message").fill("It begins")
    page.get_by_role("button", name="Save and continue").click()
    finished(page)
    assert texts(page) == ["first", "It begins and so on."]
    act(page, "Edit", 0)
    page.get_by_label("Edit the message").fill("not kept")
    page.keyboard.press("Escape")
    assert texts(page)[0] == "first"


@in_browser
def test_conversations_survive_a_reload(page, server):
    say(page, "first chat")
    page.click("#new-chat")
    say(page, "second chat")
    page.reload()
    page.wait_for_selector(".message")
    assert texts(page) == ["second chat", "You said: second chat"]
    assert titles(page) == ["second chat", "first chat"]
    open_chat(page, "first chat")
    assert texts(page)[0] == "first chat"
    page.go_back()
    page.locator("#conversations .open", has_text="second chat").wait_for()
    assert texts(page)[0] == "second chat"
    page.goto(server.url)  # without an address of a conversation: a new one
    page.wait_for_selector("#welcome:not([hidden])")
    assert len(titles(page)) == 2


@in_browser
def test_a_page_closed_in_mid_sentence_keeps_what_there_was(page):
    say(page, "slow", wait=False)
    appears(page, "word90 ")
    page.reload()
    page.wait_for_selector(".message")
    assert texts(page)[-1].startswith("word0 word1")


@in_browser
def test_a_conversation_is_renamed_and_deleted(page):
    for text in ("one", "two"):
        page.click("#new-chat")
        say(page, text)
    page.get_by_role("button", name="Options for one").click()
    page.get_by_role("button", name="Rename").click()
    page.keyboard.type("A better name")
    page.keyboard.press("Enter")
    assert titles(page) == ["two", "A better name"]
    page.get_by_role("button", name="Options for two").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    assert titles(page) == ["A better name"] and page.is_visible("#welcome")
    page.get_by_role("button", name="Undo").click()
    assert titles(page) == ["two", "A better name"] and texts(page)[0] == "two"
    page.reload()
    page.wait_for_selector(".message")
    assert titles(page) == ["two", "A better name"]


def import_file(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files(path)
    page.wait_for_selector(".toast")
    return page.inner_text(".toast span")


@in_browser
def test_conversations_are_exported_and_imported(page, open_page, tmp_path):
    say(page, "keep me")
    page.click("#new-chat")
    page.select_option("#model", "tiny-base")
    page.fill("#sheet", "Once upon a time")
    page.click("#send")
    finished(page)
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    exported = json.loads(file.read_text())
    assert [each["title"] or each["text"][:4] for each in exported["conversations"]] == ["", "Once"]
    assert import_file(page, file) == "0 conversations imported, 2 already here."

    other = open_page()
    assert import_file(other, file) == "2 conversations imported."
    open_chat(other, "keep me")
    assert texts(other) == ["keep me", "You said: keep me"]
    act(other, "Edit", 0)
    other.get_by_label("Edit the message").fill("changed here")
    other.get_by_role("button", name="Save", exact=True).click()
    assert import_file(other, file) == "1 conversation imported, 1 already here."
    assert sorted(titles(other))[:2] == ["Once upon a time and then it ended.", "changed here"]
    other.reload()
    other.wait_for_selector("#conversations a")
    assert len(titles(other)) == 3


GOOD = {"format": "llama_jax conversations", "version": 1, "conversations": []}
TALK = {"id": "a", "messages": [{"role": "user", "content": "hi"}]}
FOREIGN = {
    "not JSON": ("{", "it is not JSON."),
    "a list": ("[]", "it is not an export of this page."),
    "others'": ('{"conversations": [{"title": "x"}]}', "it is not an export of this page."),
    "newer": (
        json.dumps(GOOD | {"version": 2}),
        "its version is 2, and this page reads version 1.",
    ),
    "a role": (
        json.dumps(GOOD | {"conversations": [TALK, {"messages": [{"role": "tool"}]}]}),
        "conversation 2: the role of message 1 is unknown.",
    ),
    "a number": (
        json.dumps(GOOD | {"conversations": [TALK | {"title": 3}]}),
        "conversation 1: title is not a string.",
    ),
    "null": (json.dumps(GOOD | {"conversations": [None]}), "conversation 1: it has no messages."),
}


@in_browser
def test_foreign_files_are_refused_and_nothing_is_lost(page, tmp_path):
    say(page, "keep me")
    for name, (content, reason) in FOREIGN.items():
        file = tmp_path / "notes.json"
        file.write_text(content)
        expected = f"notes.json was not imported: {reason} Nothing was changed."
        assert import_file(page, file) == expected, name
        page.get_by_role("button", name="Close this message").click()
    assert titles(page) == ["keep me"] and texts(page)[0] == "keep me"


@in_browser
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


@in_browser
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


def open_messages(page, texts):
    """Import a conversation of answers and open it."""
    talk = {"id": "x", "messages": [{"role": "assistant", "content": each} for each in texts]}
    data = json.dumps(GOOD | {"conversations": [talk]}).encode()
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files({"name": "a.json", "mimeType": "application/json", "buffer": data})
    page.locator("#conversations a").first.click()
    page.wait_for_selector(f".message >> nth={len(texts) - 1}")


@in_browser
def test_markdown_of_many_kinds(page):
    open_messages(page, MARKDOWN)
    bodies = page.locator(".body").evaluate_all("nodes => nodes.map((node) => node.innerHTML)")
    bare = [
        re.sub(r"<header>.*?</header>", "", re.sub(r"<(\w+) [^>]*>", r"<\1>", each))
        for each in bodies
    ]
    assert dict(zip(MARKDOWN, bare)) == MARKDOWN


@in_browser
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


@in_browser
def test_a_reader_who_scrolled_up_is_not_moved(page):
    say(page, "lines", wait=False)
    appears(page, "line 40")
    at_end = "(({scrollHeight: h, scrollTop: t, clientHeight: c}) => h - t - c < 30)"
    scroller = "document.getElementById('scroller')"
    assert page.evaluate(f"{at_end}({scroller})")
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -400)
    page.wait_for_selector("#to-end:not([hidden])")
    page.wait_for_timeout(100)
    place = page.evaluate(f"{scroller}.scrollTop")
    appears(page, "line 80")
    assert page.evaluate(f"{scroller}.scrollTop") == place
    page.click("#to-end")
    appears(page, "line 110")
    assert page.evaluate(f"{at_end}({scroller})")
    page.keyboard.press("Escape")


@in_browser
def test_the_model_is_kept_with_each_chat(page, server):
    say(page, "to the first")
    page.click("#new-chat")
    page.select_option("#model", "tiny-base")
    page.fill("#sheet", "Once")
    page.press("#sheet", "Control+Enter")
    finished(page)
    assert server.requests[-1]["model"] == "tiny-base"
    open_chat(page, "to the first")
    assert page.input_value("#model") == "tiny-chat"
    open_chat(page, "Once")
    assert page.input_value("#model") == "tiny-base"
    assert page.is_disabled("#chat-mode")  # a base model knows no messages


@in_browser
def test_a_base_model_completes_texts_from_templates(page, server):
    page.select_option("#model", "tiny-base")
    page.get_by_role("button", name="Templates").click()
    names = page.locator("#templates li").all_inner_texts()
    assert " ".join(names) == (
        "default chatbot ai-dialog instruction rewrite translate tweet-sentiment"
    )
    page.get_by_role("button", name="translate").click()
    selected = "(({selectionStart: a, selectionEnd: b, value: v}) => v.slice(a, b))"
    assert page.evaluate(f"{selected}(document.getElementById('sheet'))") == ">PROMPT"
    page.keyboard.type("Good evening.")
    page.keyboard.press("Control+Enter")
    finished(page)
    prompt = server.requests[-1]["prompt"]
    assert (
        prompt.endswith("English: Good evening.\nFrench:") and "messages" not in server.requests[-1]
    )
    assert page.input_value("#sheet") == prompt + " and then it ended."
    page.get_by_role("button", name="Complete again").click()
    finished(page)
    assert server.requests[-1]["prompt"] == prompt
    page.get_by_role("button", name="Take back the last completion").click()
    assert page.input_value("#sheet") == prompt

    page.fill("#sheet", "A recipe for >PROMPT:")
    page.get_by_role("button", name="Templates").click()
    page.get_by_label("Name of the template").fill("recipe")
    page.get_by_role("button", name="Save", exact=True).click()
    page.reload()
    page.wait_for_selector("#sheet:visible, #welcome:visible")
    page.get_by_role("button", name="Templates").click()
    page.get_by_role("button", name="recipe", exact=True).click()
    assert page.input_value("#sheet, #draft >> visible=true") == "A recipe for >PROMPT:"
    page.get_by_role("button", name="Templates").click()
    page.get_by_role("button", name="Delete the template recipe").click()
    assert page.locator("#templates li").count() == 7


@in_browser
def test_settings_are_sent_and_kept(page, server):
    page.click("#show-settings")
    assert page.get_attribute("#set-temperature", "placeholder") == "0.7"  # the model's
    page.fill("#system", "Be brief.")
    for name, value in {
        "temperature": "0",
        "top_k": "40",
        "seed": "7",
        "stop": "###\n\\nUser:",
    }.items():
        page.fill(f"#set-{name}", value)
    page.fill("#set-top_p", "1.5")
    assert "expected a number from" in page.inner_text("#set-top_p-hint")
    page.keyboard.press("Escape")
    say(page, "hello")
    sent = server.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["temperature"], sent["top_k"], sent["seed"], sent["top_p"]) == (0, 40, 7, 0.9)
    assert sent["stop"] == ["###", "\nUser:"]
    page.reload()
    page.wait_for_selector(".message")
    page.click("#show-settings")
    assert page.input_value("#system") == "Be brief." and page.input_value("#set-top_k") == "40"
    assert page.input_value("#set-stop") == "###\n\\nUser:"
    page.get_by_role("button", name="Back to the defaults").click()
    assert page.input_value("#set-top_k") == ""


@in_browser
def test_answers_have_room_in_the_context(page, server):
    say(page, "hello")
    assert server.requests[-1]["max_tokens"] == 512
    say(page, "word " * 1200)  # the server counts what is left
    assert "max_tokens" not in server.requests[-1]
    page.click("#new-chat")
    page.select_option("#model", "tiny-base")
    page.fill("#sheet", "word " * 100)
    page.click("#send")
    assert server.requests[-1]["max_tokens"] == (512 - 167) // 2


@in_browser
def test_a_cut_answer_says_why(page, server):
    page.click("#show-settings")
    page.fill("#set-max_tokens", "2")
    page.keyboard.press("Escape")
    say(page, "hello")
    assert "Ended at max tokens" in page.inner_text("#messages")


@in_browser
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fail", "the server failed; its log says how"),
        ("busy", "64 requests are waiting; try again later (in 3 s)"),
        ("break", "out of memory"),
        ("cut", "The server cannot be reached, or the connection broke."),
    ],
)
def test_errors_are_shown_in_words_with_a_retry(page, server, text, words):
    say(page, text)
    assert page.inner_text(".notice span") == words
    count = len(server.requests)
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert len(server.requests) == count + 1
    if text in ("break", "cut"):  # the half that came is kept, and gone on with
        assert texts(page)[-1].startswith("You said: ") and texts(page)[-1].endswith("so on.")
        assert page.locator(".notice").count() == 0


@in_browser
def test_a_server_that_is_gone_is_named_and_found_again(browser, open_page):
    from fake_server import FakeServer

    with FakeServer() as server:
        page = open_page(server.url)
        page.context.set_offline(True)
        say(page, "hello")
        assert "cannot be reached" in page.inner_text(".notice")
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        finished(page)
        assert texts(page) == ["hello", "You said: hello"]


@in_browser
def test_a_key_is_asked_for_and_kept_for_the_session(open_page):
    from fake_server import FakeServer

    with FakeServer(key="secret") as server:
        page = open_page(server.url)
        for key in ("wrong", "secret"):
            page.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
            page.wait_for_timeout(200)
        say(page, "hello")
        assert texts(page)[-1] == "You said: hello"
        page.reload()
        page.wait_for_selector(".message")
        assert not page.is_visible("#key-dialog")
        assert page.evaluate("JSON.stringify(localStorage)").count("secret") == 0


@in_browser
@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "indexedDB.open = () => { throw new DOMException('blocked', 'SecurityError'); };",
            "keeps no data",
        ),
        (
            "IDBObjectStore.prototype.put = () => {"
            " throw new DOMException('full', 'QuotaExceededError'); };",
            "storage is full",
        ),
    ],
)
def test_without_storage_the_page_says_so_and_goes_on(open_page, script, words):
    page = open_page(script=script)
    say(page, "hello")
    assert words in page.inner_text(".toast")
    say(page, "again")
    assert texts(page)[-1] == "You said: again"
    page.click("#new-chat")
    open_chat(page, "hello")
    assert len(texts(page)) == 4


@in_browser
def test_two_tabs_show_the_same(page):
    say(page, "hello")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector(".message")
    say(other, "from the other tab")
    appears(page, "You said: from the other tab")
    assert len(texts(page)) == 4


@in_browser
def test_the_keyboard_is_enough(page):
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    assert texts(page) == []
    page.keyboard.press("Enter")
    finished(page)
    assert texts(page)[0] == "first line\nsecond line"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Control+A")
    page.keyboard.type("edited")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert texts(page) == ["edited", "You said: edited"]
    page.keyboard.press("Alt+KeyN")
    assert page.is_visible("#welcome")
    page.keyboard.press("Alt+KeyP")
    assert page.is_visible("#settings")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+KeyK")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert not page.is_visible("#help")
    page.keyboard.press("Alt+KeyI")
    assert page.evaluate("document.activeElement.id") == "draft"
    seen = set()
    for _ in range(20):  # Tab reaches everything, and is caught nowhere
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
    assert {"new-chat", "import", "export", "theme", "model", "show-settings", "chat-mode"} <= seen


NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, a, [tabindex]")]
  .filter((node) => !(node.getAttribute("aria-label") || node.labels?.[0]?.textContent.trim()
    || (node.matches("button, a") && node.textContent.trim())))
  .map((node) => node.outerHTML.slice(0, 100))"""

PALE = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = color;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = rgb.map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = rgba(getComputedStyle(node).backgroundColor);
      if (color[3] === 255) return color;
    }
    return rgba(getComputedStyle(document.body).backgroundColor);
  };
  const pale = [];
  for (const node of document.querySelectorAll("body *")) {
    const style = getComputedStyle(node);
    const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    const shows = hasText || node.matches("svg, textarea, select, input:not([type=file])");
    const isSeen = node.checkVisibility({ visibilityProperty: true });
    if (!shows || !isSeen || node.closest("script, .visually-hidden, :disabled, .skip")) continue;
    const [one, two] = [light(rgba(style.color).slice(0, 3)), light(behind(node).slice(0, 3))];
    const contrast = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    if (contrast < 4.5) pale.push([node.outerHTML.slice(0, 80), contrast]);
  }
  return pale;
}"""


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_controls_have_names_and_text_has_contrast(open_page, scheme):
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    assert page.evaluate(PALE) == []
    for text in ("markdown", "fail"):
        say(page, text)
        assert page.evaluate(NAMELESS) == [] and page.evaluate(PALE) == []
    act(page, "Edit", 0)
    assert page.evaluate(NAMELESS) == [] and page.evaluate(PALE) == []
    page.keyboard.press("Escape")
    page.click("#show-templates")
    assert page.evaluate(PALE) == []
    page.keyboard.press("Escape")
    page.click("#show-settings")
    page.fill("#set-top_p", "3")
    assert page.evaluate(NAMELESS) == [] and page.evaluate(PALE) == []
    assert page.evaluate("document.getAnimations().length") == 0


@in_browser
def test_colours_follow_the_system_or_the_switch(open_page):
    page = open_page(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-label") == "Colours: light"
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.evaluate(background) == light
    page.click("#theme")
    assert page.evaluate(background) == dark


@in_browser
@pytest.mark.parametrize("width", [320, 768, 2560])
def test_the_page_fits_any_width(open_page, width):
    page = open_page(viewport={"width": width, "height": 640})
    fits = "document.documentElement.scrollWidth <= innerWidth && [...document.querySelectorAll("
    fits += "'#scroller, #sidebar, dialog')].every((node) => node.scrollWidth <= node.clientWidth)"
    for text in ("markdown", "attack", "x" * 300, "fail"):
        say(page, text)
        assert page.evaluate(fits)
    page.click("#show-settings")
    assert page.evaluate(fits)
    page.keyboard.press("Escape")
    if width == 320:
        assert not page.is_visible("#new-chat")
        page.get_by_role("button", name="Conversations").click()
        assert page.is_visible("#new-chat") and page.evaluate(fits)
        page.keyboard.press("Escape")
        page.wait_for_selector("#new-chat", state="hidden")
        page.get_by_role("button", name="Conversations").click()
        page.locator("#conversations a").first.click()
        page.wait_for_selector("#new-chat", state="hidden")
        small = (
            "[...document.querySelectorAll('main button')].filter((node) => node.checkVisibility()"
        )
        small += " && Math.min(node.offsetWidth, node.offsetHeight) < 24).length"
        assert page.evaluate(small) == 0  # large enough for a finger


@in_browser
def test_the_real_server_has_the_page_and_answers(open_page, tmp_path):
    pytest.importorskip("openai")  # of the extra test-serve, with which servers are tested
    from servers import SCRIPT, Server, write_scripted

    server = Server("--slots=1", f"--model=script={write_scripted(tmp_path / 'script')}")
    try:
        page = open_page(f"{server.url}/")
        page.set_default_timeout(60_000)
        say(page, "hello")
        assert texts(page) == ["hello", SCRIPT]
        assert re.match(r"[\d.]+ tokens/s · \d+ tokens", page.inner_text("#speed"))
        assert page.inner_text("#context").endswith(" of 512 tokens")
        page.click("#complete-mode")
        page.fill("#sheet", "on")
        page.press("#sheet", "Control+Enter")
        finished(page)
        assert re.fullmatch("(?s)on.+", page.input_value("#sheet"))
    finally:
        server.stop()
