"""What `mkdocs` adds to docs/ for the site: pages from elsewhere in the repository, and the API.

Links are written for readers of the repository; on the site they lead to the same page or file.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import llama_jax

ROOT = Path(__file__).resolve().parents[1]
PLACES = {  # of files on the site, by their places in the repository; docs/ is its root
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "docs/decisions": "decisions/index.md",
    "CITATION.cff": "CITATION.cff",
}
PLACES |= {f"notebooks/{path.name}": path.name for path in ROOT.glob("notebooks/*.ipynb")}
SOURCES = {place: source for source, place in PLACES.items()}
DECISIONS = sorted(ROOT.glob("docs/decisions/*.md"))
RESULTS = ("inference.completions.Completion", "inference.completions.Usage")
RESULTS += ("inference.request.Delta", "inference.request.TokenLogprob")
SECTIONS = ("ModelConfig", "DataConfig", "OptimizerConfig", "MeshConfig", "RunConfig")
SECTIONS += ("LoraConfig", "DpoConfig")


def api_page() -> str:
    """Return the page of the public names, of what they return, and of a config's sections."""
    homes = llama_jax._HOMES
    names = [f"{homes[name]}.{name}" for name in sorted(homes)]
    names += [*RESULTS, *(f"config.{name}" for name in SECTIONS)]
    head = "# API\n\n`import llama_jax` has the names up to `unstack`; the others are returned"
    head += " by their methods, or are parts of `Config`.\n\n"
    return head + "\n\n".join(f"::: llama_jax.{name}" for name in names)


def decisions_page() -> str:
    """Return the list of decisions, by the titles of their pages."""
    lines = (f"- [{path.read_text().splitlines()[0][2:]}]({path.name})" for path in DECISIONS)
    return "# Decisions\n\n" + "\n".join(lines)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and files from outside of docs/."""
    made = {"api.md": api_page(), "decisions/index.md": decisions_page()}
    for source, place in PLACES.items():
        made.setdefault(place, (ROOT / source).read_text() if (ROOT / source).is_file() else "")
    for place, content in made.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with its links as the site has them."""
    place = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(place, f"docs/{place}"))

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path, hash_, fragment = target.partition("#")
        if not path or "://" in path or place in ("api.md", "decisions/index.md"):
            return match[0]
        source = posixpath.normpath(posixpath.join(folder, path))
        there = PLACES.get(source, source.removeprefix("docs/"))
        there = os.path.relpath(there, posixpath.dirname(place) or ".")
        return f"{before}{there}{hash_}{fragment}{after}"

    return re.sub(r'(\]\(|src=")([^)"\s]+)([)"])', moved, markdown)
