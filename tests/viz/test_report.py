"""The report: one closed file, and no text anywhere that becomes markup."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from pullback.result import Attribution
from pullback.viz import Attributions, Figure, Prose, Table, bars, html_spans, write_report
from pullback.viz.report import environment, fragment

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)',
    '" style="position:fixed" x="',
    "</style><script>alert(1)</script>",
    "</title><svg onload=alert(1)>",
    "</p></div></section><h1>x",
    "--><script>alert(1)</script><!--",
    "<![CDATA[<script>]]>",
    "&lt;script&gt;&#60;b&#62;",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "<a href='data:text/html,<script>'>",
    "\u2028<b>\u2029",
    "\x00<i>\x0b",
    "\ud83d<u>",
    "`<iframe srcdoc=`",
    "<math><mtext></table><mglyph><style><img src onerror=alert(1)>",
    "expression(alert(1));}body{display:none",
    "<p\tonclick=alert(1)\r>",
]
PLAIN = "word"


class Structure(HTMLParser):
    """Tags with their attribute names, attribute values apart from pictures and colours, and all text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(("/" + tag, ()))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", (data,)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def structure(page: str) -> Structure:
    parser = Structure()
    parser.feed(page)
    parser.close()
    return parser


def attribution(text: str, values: Any, tokens: Any = None) -> Attribution:
    diagnostics = {
        "gap": torch.tensor([1e-3]),
        "converged": torch.tensor([True]),
        "evaluations": 64,
        "notes": [text],
        "coverage": {text: text},
        "seconds": 0.25,
    }
    return Attribution(
        values,
        values,
        (text,),
        torch.ones(1),
        text,
        text,
        text,
        diagnostics,
        {"labels": [text], "tokens": tokens},
    )


def page_with(text: str, path: Path) -> str:
    words = attribution(text, torch.tensor([[1.0, -1.0]]), [[text, "b"]])
    image = attribution(text, torch.ones(1, 3, 8, 8))
    line = attribution(text, torch.linspace(-1, 1, 64)[None])
    write_report(
        path,
        [
            Prose(text),
            Table(text, [text, "n"], [[text, 1.0]], note=text),
            Figure(text, bars([PLAIN], [1.0]).figure),
            Attributions(text, {text: words}),
            Attributions(text, {text: image, "other": image}),
            Attributions(text, {text: line}),
        ],
        title=text,
    )
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_an_element_or_an_attribute(text: str, tmp_path: Path) -> None:
    hostile, plain = structure(page_with(text, tmp_path / "a")), structure(page_with(PLAIN, tmp_path / "b"))
    assert hostile.tags == plain.tags
    assert [name for name, _ in hostile.attributes] == [name for name, _ in plain.attributes]
    for name, value in hostile.attributes:
        if name in ("src", "style"):
            assert re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/=]+|background:rgba\([\d,.]+\)", value)
    for one in (fragment(attribution(text, torch.ones(1, 2), [[text, "b"]])), html_spans([text], [1.0])):
        assert {tag for tag, _ in structure(one).tags} <= {
            *(
                "div",
                "/div",
                "style",
                "/style",
                "span",
                "/span",
                "h3",
                "/h3",
                "small",
                "/small",
                "p",
                "/p",
                "wbr",
            ),
            *("table", "/table", "thead", "/thead", "tbody", "/tbody", "tr", "/tr", "th", "/th", "td", "/td"),
            *("ul", "/ul", "li", "/li", "strong", "/strong", "details", "/details", "summary", "/summary"),
        }


def test_the_check_itself_can_fail() -> None:
    assert structure(f"<p>{HOSTILE[0]}</p>").tags != structure("<p>word</p>").tags


def test_text_arrives_readable(tmp_path: Path) -> None:
    found = "".join(structure(page_with("<b> & \"q\" 'a'", tmp_path / "a")).text)
    assert found.count("<b> & \"q\" 'a'") > 10


def test_page_is_closed(tmp_path: Path) -> None:
    page = page_with(PLAIN, tmp_path / "a.html")
    parsed = structure(page)
    assert page.startswith("<!DOCTYPE html>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in parsed.attributes
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]+", "", page))
    assert all(value for name, value in parsed.attributes if name == "alt")
    sources = [value for name, value in parsed.attributes if name == "src"]
    assert sources
    assert all(base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG") for source in sources)
    opened = [
        tag for tag, _ in parsed.tags if tag not in ("meta", "img", "wbr", "br") and not tag.startswith("/")
    ]
    assert sorted(opened) == sorted(tag[1:] for tag, _ in parsed.tags if tag.startswith("/"))


def test_page_is_the_same_every_time(tmp_path: Path) -> None:
    assert page_with(PLAIN, tmp_path / "a") == page_with(PLAIN, tmp_path / "b")


def test_environment_escapes_whatever_the_template_is_called() -> None:
    assert environment().from_string("{{ x }}").render(x="<b>") == "&lt;b&gt;"


def test_method_table_states_cost_and_trust(tmp_path: Path) -> None:
    values = torch.ones(3, 4)
    a = Attribution(
        values,
        values,
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 4.0]),
        "IntegratedGradients(tol=0.01)",
        "input",
        None,
        {
            "gap": torch.tensor([0.5, -0.25, 0.0]),
            "converged": torch.tensor([True, False, True]),
            "evaluations": torch.tensor([64, 256, 64]),
        },
        {},
    )
    write_report(tmp_path / "a", [Attributions("x", {"ours": a}, examples=2)])
    text = "|".join(structure((tmp_path / "a").read_text("utf-8")).text)
    for part in (
        "1 to 4",
        "-0.25 to 0.5",
        "64 to 256",
        "2 of 3",
        "IntegratedGradients(tol=0.01)",
        "1 more not shown",
    ):
        assert part in text
    assert "signed, scale = 99th percentile of |a|" in text


def test_tables_format_numbers_and_missing_values(tmp_path: Path) -> None:
    write_report(tmp_path / "a", [Table("t", ["a", "b", "c"], [[0.123456, None, True], [1e-9, 2, False]])])
    text = structure((tmp_path / "a").read_text("utf-8")).text
    for cell in ("0.1235", "–", "yes", "1e-09", "2", "no"):
        assert cell in text


def test_spans_are_red_for_positive_blue_for_negative_and_stronger_for_larger() -> None:
    spans = [
        tuple(float(part) for part in value[len("background:rgba(") : -1].split(","))
        for name, value in structure(
            html_spans(["a", "b", "c", "d"], [2.0, -1.0, 0.0, float("nan")])
        ).attributes
        if name == "style"
    ]
    assert spans[0][0] > spans[0][2]
    assert spans[1][2] > spans[1][0]
    assert spans[0][3] > spans[1][3] > spans[2][3] == 0.0
    assert spans[3][:3] == (128, 128, 128)


def test_large_maps_are_averaged_down_and_empty_reports_and_batches_work(tmp_path: Path) -> None:
    big = torch.rand(1, 1, 700, 900, generator=torch.Generator().manual_seed(0))
    attribution(PLAIN, big).to_html(tmp_path / "a")
    picture = next(v for k, v in structure((tmp_path / "a").read_text("utf-8")).attributes if k == "src")
    data = base64.b64decode(picture.split(",")[1])
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (320, 249)
    write_report(tmp_path / "b", [Attributions("", {})])
    attribution(PLAIN, big)[[]].to_html(tmp_path / "c")
    assert "score" in attribution(PLAIN, torch.ones(1, 2))._repr_html_()


def test_a_newline_token_breaks_the_line_and_stays_text() -> None:
    parsed = structure(html_spans(["<p\nonclick=x>", "b"], [1.0, 1.0]))
    assert [tag for tag, _ in parsed.tags] == ["span", "/span", "br", "span", "/span", "wbr"]
    assert parsed.text[0] == "<p↵onclick=x>"
