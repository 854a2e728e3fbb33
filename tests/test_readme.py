"""What the README says of the tree, the size, the configs, the commands and the flags is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TREE = README.split("```text\ntrain.py", 1)[1].split("```", 1)[0]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_the_core_is_as_small_as_claimed():
    claim = re.search(r"core \(([a-z,\s]+)\) is under ([\d,]+) lines", README)
    rooms, claimed = re.findall(r"\w+", claim[1]), int(claim[2].replace(",", ""))
    files = [path for room in rooms for path in (ROOT / "llama_jax" / room).glob("*.py")]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert claimed - 1000 < lines < claimed


def test_every_command_is_named():
    from llama_jax.cli.main import COMMANDS

    named = README.split("subcommand of `llama-jax`:", 1)[1].split(".\n", 1)[0]
    assert re.findall(r"`([a-z-]+)`", named) == list(COMMANDS)


def test_every_room_is_in_the_tree():
    named = set(re.findall(r"[a-z_]+\.py|[a-z_]+/(?=\s)", "train.py" + TREE))
    standing = {f"{path.parent.name}/" for path in (ROOT / "llama_jax").glob("*/__init__.py")}
    standing |= {path.name for path in (ROOT / "llama_jax").glob("*.py")} - {"__init__.py"}
    standing |= {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    assert standing <= named


def test_everything_in_the_tree_exists():
    places = [ROOT, ROOT / "llama_jax", ROOT / "tests"]
    for name in re.findall(r"[a-z_]+\.py|[a-z_/]+/(?=\s)", "train.py" + TREE):
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("config", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_the_table_has_every_config_with_its_numbers(config):
    from llama_jax.cli.config_flags import read_config
    from llama_jax.model.parameters import count_parameters

    run = read_config(f"{ROOT / 'configs' / config}.py")
    row = f"| `{config}` | {count_parameters(run.model):,} | {run.tokens_per_step:,} |"
    assert row in (ROOT / "docs" / "training.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_are_keys(page):
    from llama_jax.cli.config_flags import load_config

    keys = re.findall(r"--config\.([a-z_.0-9]*[a-z0-9])", page.read_text())
    for key in sorted(set(keys)):
        config = load_config(str(ROOT / "configs" / "demo.py"))
        for name in key.split("."):
            config = config[name]


def commands(text):
    """Return the set of flags of each script that a page runs; `--config.…` is tested above."""
    flags = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = line.partition("#")[0]
        if found := re.search(r"\b(\w+)\.py\b(.*)", line):
            names = re.findall(r"(?<=\s)--[a-z_]+(?![\w.])", found[2])
            flags.setdefault(found[1], set()).update(names)
    return {name: found for name, found in flags.items() if (ROOT / f"{name}.py").is_file()}


def test_flags_in_commands_exist():
    for script, flags in commands("\n".join(page.read_text() for page in PAGES)).items():
        words = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
        known = set(re.findall(r"--[a-z_]+", done.stdout))
        assert flags <= known, f"{script}.py has no {flags - known}"


def anchors(page):
    """Return the fragments of a page's headings, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)|<img [^>]*src=\"([^\"]+)\"", page.read_text())
    for target, _, fragment in ("".join(link).partition("#") for link in links):
        if not target.startswith("https://"):
            found = page.parent / target if target else page
            assert found.exists(), target
            assert not fragment or fragment in anchors(found), f"{target}#{fragment}"
