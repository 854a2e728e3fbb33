"""The chat page: sending, stopping, editing, errors, and the real server."""

import re
import time

import pytest
from page_driver import act, appears, finished, say, texts

pytestmark = pytest.mark.page


def test_a_message_is_sent_and_answered(page, page_server):
    say(page, "Hello there")
    assert texts(page) == ["Hello there", "You said: Hello there"]
    sent = page_server.requests[-1]
    assert sent["messages"] == [{"role": "user", "content": "Hello there"}]
    assert sent["model"] == "tiny-chat" and sent["stream_options"] == {"include_usage": True}
    assert (sent["temperature"], sent["max_tokens"]) == (0.7, 512)
    assert page.inner_text("#speed") == "41.5 tokens/s · 4 tokens · first after 0.12 s"
    assert re.fullmatch(r"\d+ of 2,048 tokens", page.inner_text("#context"))
    assert page.inner_text("#announcer") == "You said: Hello there"
    say(page, "And again")
    roles = [message["role"] for message in page_server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_an_answer_appears_while_it_is_written_and_stops(page, page_server):
    cancelled = page_server.cancelled
    say(page, "slow", wait=False)
    appears(page, "word5 ")
    assert "word390" not in page.inner_text("#messages")
    page.click("#stop")
    finished(page)
    kept = texts(page)[-1]
    assert kept.startswith("word0 word1 ") and "Stopped" in page.inner_text("#messages")
    deadline = time.monotonic() + 2
    while page_server.cancelled == cancelled and time.monotonic() < deadline:
        page.wait_for_timeout(20)
    assert page_server.cancelled == cancelled + 1  # the server notices, and its slot is free
    assert page.evaluate("document.activeElement.id") == "draft"
    act(page, "Continue")
    finished(page)
    assert texts(page)[-1] == kept + " and so on."
    assert page_server.requests[-1]["continue_final_message"] is True
    assert page_server.requests[-1]["messages"][-1]["role"] == "assistant"


def test_escape_stops(page):
    say(page, "slow", wait=False)
    appears(page, "word3 ")
    page.keyboard.press("Escape")
    finished(page)
    assert "word390" not in page.inner_text("#messages")


def test_an_answer_is_replaced_and_brought_back(page, page_server):
    say(page, "one")
    say(page, "two")
    seed = page_server.requests[-1]["seed"]
    act(page, "Answer again", 1)
    finished(page)
    assert texts(page) == ["one", "You said: one"]
    assert page_server.requests[-1]["seed"] != seed
    page.get_by_role("button", name="Undo").click()
    assert texts(page) == ["one", "You said: one", "two", "You said: two"]


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


def test_an_answer_being_written_is_asked_for_again(page):
    say(page, "slow", wait=False)
    appears(page, "word3 ")
    page.keyboard.press("Alt+KeyR")
    page.wait_for_timeout(300)  # the end of the first does not pass for that of the second
    assert page.is_visible("#stop") and len(texts(page)) == 2
    page.keyboard.press("Escape")
    finished(page)


def test_messages_are_edited_in_place(page, page_server):
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


def test_answers_have_room_in_the_context(page, page_server):
    say(page, "hello")
    assert page_server.requests[-1]["max_tokens"] == 512
    say(page, "word " * 1200)  # the server counts what is left
    assert "max_tokens" not in page_server.requests[-1]
    page.click("#new-chat")
    page.select_option("#model", "tiny-base")
    page.fill("#sheet", "word " * 100)
    page.click("#send")
    assert page_server.requests[-1]["max_tokens"] == (512 - 167) // 2


def test_a_cut_answer_says_why(page, page_server):
    page.click("#show-settings")
    page.fill("#set-max_tokens", "2")
    page.keyboard.press("Escape")
    say(page, "hello")
    assert "Ended at max tokens" in page.inner_text("#messages")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fail", "the server failed; its log says how"),
        ("busy", "64 requests are waiting; try again later (in 3 s)"),
        ("break", "out of memory"),
        ("cut", "The server cannot be reached, or the connection broke."),
    ],
)
def test_errors_are_shown_in_words_with_a_retry(page, page_server, text, words):
    say(page, text)
    assert page.inner_text(".notice span") == words
    count = len(page_server.requests)
    page.get_by_role("button", name="Try again").click()
    finished(page)
    assert len(page_server.requests) == count + 1
    if text in ("break", "cut"):  # the half that came is kept, and gone on with
        assert texts(page)[-1].startswith("You said: ") and texts(page)[-1].endswith("so on.")
        assert page.locator(".notice").count() == 0


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


def test_the_real_server_has_the_page_and_answers(open_page, tmp_path):
    pytest.importorskip("openai")  # of the extra test-serve, with which servers are tested
    from playwright.sync_api import expect
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
        expect(page.locator("#sheet")).to_have_value(re.compile("on.+", re.DOTALL))
    finally:
        server.stop()
