"""Every page: its pictures and the files it points to are there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith(("http:", "https:")) and not (page.parent / t).exists()]
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
