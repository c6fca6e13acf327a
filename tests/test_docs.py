"""The documentation is true: its code runs, its outputs are what it prints, its links and tables are whole.

Blocks of one file share a namespace and run in order in an empty folder. The first line of a block says more:
``python no-run`` is not run; ``python raises`` must end in the error whose text the next block shows. A ``text``
block right after a python block is its output: white space is compared loosely, so long lines may be wrapped, and
"..." stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import pullback as pb
from pullback.core import errors

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ERRORS = [name for name in errors.__all__ if name.endswith("Error")]
FENCE = re.compile(r"^(`{3,})([^\n]*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One python block, and the text block right after it if there is one."""

    line: int
    kind: str
    code: str
    shown: str | None


def blocks(text: str) -> Iterator[Block]:
    found = list(FENCE.finditer(text))
    for number, block in enumerate(found):
        kind = block[2].strip()
        if kind.split(" ")[0] != "python":
            continue
        after = found[number + 1] if number + 1 < len(found) else None
        follows = after is not None and after[2] == "text" and not text[block.end() : after.start()].strip()
        yield Block(
            text[: block.start()].count("\n") + 2, kind, block[3], after[3] if after and follows else None
        )


def run(block: Block, page: str, names: dict[str, Any]) -> str:
    """What a block prints; for ``raises``, the error it ends in as "Type: message"."""
    out = io.StringIO()
    # the line numbers of tracebacks are those of the page
    code = compile("\n" * (block.line - 1) + block.code, page, "exec")
    with contextlib.redirect_stdout(out):
        if block.kind == "python raises":
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text block says which
                exec(code, names)
            return f"{type(caught.value).__name__}: {caught.value}"
        exec(code, names)
    return out.getvalue()


def shows(shown: str, printed: str) -> bool:
    """Whether a text block is what was printed."""
    parts = [re.escape(" ".join(part.split())) for part in shown.split("...")]
    return re.fullmatch(r"\s*.*\s*".join(parts), " ".join(printed.split())) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs_and_prints_what_is_shown(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # dataclasses look their module up by name
    module = types.ModuleType("documentation")
    monkeypatch.setitem(sys.modules, "documentation", module)
    names = vars(module)
    with torch.random.fork_rng():
        for block in blocks(page.read_text(encoding="utf-8")):
            assert block.kind in ("python", "python raises", "python no-run"), f"{page.name}:{block.line}"
            if block.kind == "python no-run":
                continue
            printed = run(block, str(page), names)
            assert block.kind == "python" or block.shown is not None, (
                f"{page.name}:{block.line} shows no error"
            )
            if block.shown is not None:
                assert shows(block.shown, printed), f"{page.name}:{block.line} printed\n{printed}"


def test_few_blocks_are_left_out() -> None:
    left_out = [
        page.name for page in PAGES for block in blocks(page.read_text()) if block.kind == "python no-run"
    ]
    assert len(left_out) <= 2, left_out


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them."""
    plain = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?)\s*$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in headings(target), f"{page.name}: {link}"


def test_paths_named_in_messages_and_docstrings_exist() -> None:
    for file in (ROOT / "pullback").rglob("*.py"):
        for path in re.findall(r"docs/[\w\-/]+\.md", file.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{file.name} names {path}"


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_a_page_that_shows_it(name: str) -> None:
    page = ROOT / "docs" / "errors" / f"{name}.md"
    shown = [block.shown or "" for block in blocks(page.read_text()) if block.kind == "python raises"]
    assert shown
    assert all(text.startswith(f"{name}: ") for text in shown), shown


def test_no_error_page_is_left_over() -> None:
    assert {page.stem for page in (ROOT / "docs" / "errors").glob("*.md")} == set(ERRORS)


def test_every_method_is_in_the_table_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(pb.METHODS)
    assert all(sentence.endswith(".") and source for _, sentence, source in rows)


def test_sizes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
    for picture in (ROOT / "docs" / "images").glob("*.png"):
        assert picture.stat().st_size < 200_000, picture.name


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r":\s*([\w\-/]+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in PAGES if "docs" in page.parts
    )


def test_the_checks_see_a_wrong_output() -> None:
    text = "```python\nprint(1)\n```\n\n```text\n2\n```\n```python raises\nraise ValueError('no')\n```\n"
    first, second = blocks(text)
    assert (first.shown, first.line, second.shown) == ("2\n", 2, None)
    assert run(first, "page", {}) == "1\n"
    assert shows("1", "1\n")
    assert not shows("2\n", "1\n")
    assert shows("a ... c\nd", "a b\nc d")
    assert not shows("a ... c", "a b d")
    assert not shows("a", "a b")
    assert run(second, "page", {}) == "ValueError: no"
    with pytest.raises(pytest.fail.Exception):
        run(Block(1, "python raises", "1\n", None), "page", {})
