"""Draw the picture of a terminal in motion, pictures/terminal.svg, from what commands print.

    make demo && python docs/draw_terminal.py [EVENTS]

The model of `make demo` writes a story, and SmolLM2 answers questions. EVENTS is a JSON file of
what was printed, and when; if it exists, it is drawn and nothing is run. Pauses are shortened, and
text appears no faster than the eye follows.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "terminal.svg"
COMMANDS = {  # and the lines that are typed into each
    'python sample.py --ckpt ckpt --prompt "Once upon a time" --temperature 0.7 --seed 5': [],
    "python sample.py --ckpt smollm2 --chat --temperature 0": [
        "What is the capital of Norway?",
        "Explain in two sentences why the sky is blue.",
        "/exit",
    ],
}
COLUMNS, ROWS = 100, 21
WIDTH, LINE, TOP, LEFT, LETTER = 830, 18, 54, 20, 7.83  # pixels; LETTER of 13 px monospace
TYPING, PRINTING = 0.035, 0.006  # seconds per character
WAIT, PAUSE, END = 0.4, 0.6, 8.0  # seconds at most before output, after a typed line, at the end
STYLE = """
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #c9d1d9;
  white-space: pre }
.typed { fill: #7ee787 }
.cover { fill: #0d1117; transform: translateX(WIDTHpx) }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
""".replace("WIDTH", str(WIDTH))
Event = tuple[float, bool, str]  # seconds since the one before, whether it is typed, text


def record() -> list[Event]:
    """Run the commands; return what is typed and printed."""
    events: list[Event] = []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, typed in COMMANDS.items():
        events += [(0, False, "\n")] * bool(events) + [(0, True, f"$ {command}\n")]
        process = subprocess.Popen(
            command,
            shell=True,
            cwd=ROOT,
            env=os.environ | {"PATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if typed else subprocess.DEVNULL,  # messages
        )
        assert process.stdin and process.stdout
        process.stdin.write("\n".join([*typed, ""]).encode())
        process.stdin.close()
        lines, last = iter(typed), time.monotonic()
        while block := os.read(process.stdout.fileno(), 2**16):
            now, text = time.monotonic(), block.decode(errors="replace")
            before, prompt, after = text.partition("> ") if typed else (text, "", "")
            events.append((now - last, False, before))
            if prompt:  # of the chat, which does not print what comes from a pipe
                events.append((0, True, f"> {next(lines)}\n"))
                events.append((0, False, after))
            last = now
        assert process.wait() == 0, f"{command} failed"
    return events


def screen_lines(events: list[Event]) -> tuple[list[tuple[bool, str, float, float]], float]:
    """Return the lines of the screen, with the seconds from and to which each appears, and the end.

    A line that is too long is wrapped, and appears at an even speed.
    """
    lines = []
    now, began, text = 0.5, 0.5, ""
    for seconds, typed, block in events:
        now += min(seconds, WAIT)
        for part in block.splitlines(keepends=True):
            began = began if text else now
            now += (TYPING if typed else PRINTING) * len(part)
            text += part.rstrip("\n")
            if part.endswith("\n"):
                speed = (now - began) / max(len(text), 1)
                for line in textwrap.wrap(text, COLUMNS) or [""]:
                    lines.append((typed, line, began, began + speed * len(line)))
                    began += speed * len(line)
                now += PAUSE * typed
                text = ""
    return lines, now + END


def draw(events: list[Event]) -> str:
    """Return an SVG that is animated by CSS alone, so that a README can show it.

    A cover over each line moves to the right as the line appears, and the screen scrolls. Without
    animations the last screen is shown.
    """
    lines, end = screen_lines(events)
    rules, shapes = [STYLE], []
    scroll, position = ["0% { transform: none }"], "transform: none"
    for row, (typed, line, *times) in enumerate(lines):
        begin, finish = (100 * seconds / end for seconds in times)
        finish = max(finish, begin + 0.001)
        y = TOP + LINE * row
        style = ' class="typed"' if typed else ""
        shapes.append(f'<text{style} x="{LEFT}" y="{y}">{escape(line)}</text>')
        shapes.append(
            f'<rect class="cover" style="animation: c{row} {end:.1f}s linear infinite"'
            f' y="{y - 14}" width="{WIDTH}" height="{LINE}"/>'
        )
        rules.append(
            f"@keyframes c{row} {{ 0%, {begin:.3f}% {{ transform: none }}"
            f" {finish:.3f}% {{ transform: translateX({LEFT + LETTER * len(line):.0f}px) }}"
            f" {finish + 0.001:.3f}%, 100% {{ transform: translateX({WIDTH}px) }} }}"
        )
        if row >= ROWS:
            position = f"transform: translateY({LINE * (ROWS - 1 - row)}px)"
            scroll.append(f"{begin:.3f}% {{ {position} }}")
    rules.append(f"@keyframes scroll {{ {' '.join(scroll)} 100% {{ {position} }} }}")
    rules.append(f".screen {{ {position}; animation: scroll {end:.1f}s step-end infinite }}")
    height, inside = TOP + LINE * ROWS, LINE * ROWS
    rules_text, shapes_text = "\n".join(rules), "\n".join(shapes)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">
<title>A model that learned for two and a half minutes writes a story; SmolLM2 chats</title>
<style>{rules_text}</style>
<rect width="{WIDTH}" height="{height}" rx="8" fill="#0d1117"/>
<g fill="#30363d"><circle cx="24" cy="18" r="6"/><circle cx="44" cy="18" r="6"/>\
<circle cx="64" cy="18" r="6"/></g>
<svg y="{TOP - 14}" width="{WIDTH}" height="{inside}" viewBox="0 {TOP - 14} {WIDTH} {inside}">
<g class="screen">
{shapes_text}
</g></svg></svg>
"""


def main(kept: str = "") -> None:
    """Record the commands unless `kept` exists, write that file if it has a name, and draw."""
    if kept and Path(kept).exists():
        events = [tuple(event) for event in json.loads(Path(kept).read_text())]
    else:
        events = record()
    if kept:
        Path(kept).write_text(json.dumps(events))
    PICTURE.write_text(draw(events))
    print(PICTURE)


if __name__ == "__main__":
    main(*sys.argv[1:])
