"""What the tests of the chat page do with it in a browser."""

import json
import shutil
from pathlib import Path

import llama_jax

PAGE = Path(llama_jax.__file__).parent / "serving" / "page" / "index.html"
NAMES = ("chromium", "google-chrome")  # as Debian and GitHub's runners call it
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
# A file of no conversations.
EXPORT = {"format": "llama_jax conversations", "version": 1, "conversations": []}


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


def import_file(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files(path)
    page.wait_for_selector(".toast")
    return page.inner_text(".toast span")


def open_messages(page, texts):
    """Import a conversation of answers and open it."""
    talk = {"id": "x", "messages": [{"role": "assistant", "content": each} for each in texts]}
    data = json.dumps(EXPORT | {"conversations": [talk]}).encode()
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files({"name": "a.json", "mimeType": "application/json", "buffer": data})
    page.locator("#conversations a").first.click()
    page.wait_for_selector(f".message >> nth={len(texts) - 1}")
