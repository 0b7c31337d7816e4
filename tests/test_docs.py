"""Every page: its pictures, and the files and headings it points to, are there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = (".", "docs", "docs/studies", "model_cards")
PAGES = sorted(path for folder in FOLDERS for path in (REPOSITORY / folder).glob("*.md"))


def anchors(page):
    """Anchors of a page's headings, as Hub and forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_headings(page):
    targets = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    missing = [f"{t}#{a}" for t, a in targets if a not in anchors(page.parent / t if t else page)]
    assert not missing


def test_functions_named_in_the_method_exist():
    import importlib

    text = (REPOSITORY / "docs" / "method.md").read_text(encoding="utf-8")
    names = re.findall(r"\| `((?:quantization|remedies)\.[\w.]+)` \|", text)
    assert len(names) >= 7
    for name in names:
        parts = name.split(".")
        module = importlib.import_module(".".join(["hf_oscqat", *parts[:2]]))
        target = module
        for part in parts[2:]:
            target = getattr(target, part)
