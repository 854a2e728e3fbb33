"""Draw the pictures of the chat page, pictures/chat_wide.png and chat_narrow.png.

Start a server first, then draw: make serve; python docs/draw_chat_page.py
The answers are the model's own, at temperature 0. It takes Debian's chromium and the extra
`test-page`.
"""

import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parent / "pictures"
URL = "http://127.0.0.1:8000/"
CHATS = [
    ["Write a haiku about the sea."],
    ["Explain in two sentences why the sky is blue."],
    [
        "What is the capital of Norway?",
        "Write a Python function that reverses a string, with one example.",
    ],
]
VIEWS = {
    "chat_wide": {"viewport": {"width": 1180, "height": 760}, "color_scheme": "light"},
    "chat_narrow": {
        "viewport": {"width": 390, "height": 760},
        "color_scheme": "dark",
        "has_touch": True,
        "is_mobile": True,
    },
}


def main(url: str = URL) -> None:
    """Draw both pictures of the page at a server's address."""
    with sync_playwright() as driver:
        path = shutil.which("chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, options in VIEWS.items():
            page = browser.new_page(device_scale_factor=2, **options)
            page.goto(url)
            for questions in CHATS:
                begin_chat(page)
                for question in questions:
                    ask(page, question)
            path = PICTURES / f"{name}.png"
            page.screenshot(path=path)
            Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
            print(path)
        browser.close()


def begin_chat(page: Page) -> None:
    """Begin a chat that takes the most likely tokens."""
    page.keyboard.press("Alt+KeyN")
    page.keyboard.press("Alt+KeyP")
    page.fill("#set-temperature", "0")
    page.keyboard.press("Escape")


def ask(page: Page, question: str) -> None:
    """Send a question, and wait for the answer."""
    page.fill("#draft", question)
    page.press("#draft", "Enter")
    page.wait_for_selector("#send:not([hidden])", timeout=120_000)
    page.locator("#draft").blur()


if __name__ == "__main__":
    main(*sys.argv[1:])
