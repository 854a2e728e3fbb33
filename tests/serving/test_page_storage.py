"""The chat page: conversations in the browser and in files."""

import json

import pytest
from page_driver import EXPORT, act, appears, finished, import_file, open_chat, say, texts, titles

pytestmark = pytest.mark.page


def test_conversations_survive_a_reload(page, page_server):
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
    page.goto(page_server.url)  # without an address of a conversation: a new one
    page.wait_for_selector("#welcome:not([hidden])")
    assert len(titles(page)) == 2


def test_a_page_closed_in_mid_sentence_keeps_what_there_was(page):
    say(page, "slow", wait=False)
    appears(page, "word90 ")
    page.reload()
    page.wait_for_selector(".message")
    assert texts(page)[-1].startswith("word0 word1")


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


TALK = {"id": "a", "messages": [{"role": "user", "content": "hi"}]}
FOREIGN = {
    "not JSON": ("{", "it is not JSON."),
    "a list": ("[]", "it is not an export of this page."),
    "others'": ('{"conversations": [{"title": "x"}]}', "it is not an export of this page."),
    "newer": (
        json.dumps(EXPORT | {"version": 2}),
        "its version is 2, and this page reads version 1.",
    ),
    "a role": (
        json.dumps(EXPORT | {"conversations": [TALK, {"messages": [{"role": "tool"}]}]}),
        "conversation 2: the role of message 1 is unknown.",
    ),
    "a number": (
        json.dumps(EXPORT | {"conversations": [TALK | {"title": 3}]}),
        "conversation 1: title is not a string.",
    ),
    "null": (json.dumps(EXPORT | {"conversations": [None]}), "conversation 1: it has no messages."),
}


def test_foreign_files_are_refused_and_nothing_is_lost(page, tmp_path):
    say(page, "keep me")
    for name, (content, reason) in FOREIGN.items():
        file = tmp_path / "notes.json"
        file.write_text(content)
        expected = f"notes.json was not imported: {reason} Nothing was changed."
        assert import_file(page, file) == expected, name
        page.get_by_role("button", name="Close this message").click()
    assert titles(page) == ["keep me"] and texts(page)[0] == "keep me"


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


def test_two_tabs_show_the_same(page):
    say(page, "hello")
    other = page.context.new_page()
    other.goto(page.url)
    other.wait_for_selector(".message")
    say(other, "from the other tab")
    appears(page, "You said: from the other tab")
    assert len(texts(page)) == 4
