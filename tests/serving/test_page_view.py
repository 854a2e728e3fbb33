"""The chat page: scrolling, models, settings, keyboard, contrast, widths."""

import pytest
from page_driver import act, appears, finished, open_chat, say, texts

pytestmark = pytest.mark.page


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


def test_the_model_is_kept_with_each_chat(page, page_server):
    say(page, "to the first")
    page.click("#new-chat")
    page.select_option("#model", "tiny-base")
    page.fill("#sheet", "Once")
    page.press("#sheet", "Control+Enter")
    finished(page)
    assert page_server.requests[-1]["model"] == "tiny-base"
    open_chat(page, "to the first")
    assert page.input_value("#model") == "tiny-chat"
    open_chat(page, "Once")
    assert page.input_value("#model") == "tiny-base"
    assert page.is_disabled("#chat-mode")  # a base model knows no messages


def test_a_base_model_completes_texts_from_templates(page, page_server):
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
    prompt = page_server.requests[-1]["prompt"]
    assert (
        prompt.endswith("English: Good evening.\nFrench:")
        and "messages" not in page_server.requests[-1]
    )
    assert page.input_value("#sheet") == prompt + " and then it ended."
    page.get_by_role("button", name="Complete again").click()
    finished(page)
    assert page_server.requests[-1]["prompt"] == prompt
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


def test_settings_are_sent_and_kept(page, page_server):
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
    sent = page_server.requests[-1]
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
