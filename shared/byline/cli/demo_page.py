"""The demo's page: what was asked, which sources were named, and what that rests on, in one HTML file.

Why it exists: a person judges attribution by looking at pictures side by side. The file carries its
images and styles with it, so it can be mailed or opened from disk; numbers come with their units
and with the sentence that says what they mean.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from byline.cli.show import probability_name, refusal, with_interval
from byline.client.values import Answer, Influence

STYLE = """
:root { color-scheme: light; --ink: #1d2330; --soft: #667085; --line: #e4e7ec; --blue: #2f5fd0; --paper: #f7f8fa; }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 8px; }
p { margin: 4px 0 12px; max-width: 110ch; } .soft { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 20px 0; }
.figure { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.figure b { display: block; font-size: 24px; line-height: 1.2; } .figure span { color: var(--soft); font-size: 13px; }
.query { display: grid; grid-template-columns: 190px 1fr; gap: 20px; background: #fff; border: 1px solid var(--line);
  border-radius: 12px; padding: 18px; margin: 16px 0; }
.asked img { width: 100%; border: 1px solid var(--line); border-radius: 8px; display: block; }
.asked .prompt { font-weight: 600; margin: 8px 0 2px; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 8px; }
.source img { width: 100%; aspect-ratio: 1; object-fit: contain; border: 1px solid var(--line); border-radius: 6px;
  background: #fff; display: block; }
.source { font-size: 12px; line-height: 1.35; min-width: 0; }
.source .caption { overflow: hidden; display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; }
.source .by { color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.source .score { font-variant-numeric: tabular-nums; }
.bar { height: 4px; background: var(--line); border-radius: 2px; margin: 4px 0; }
.bar i { display: block; height: 100%; background: var(--blue); border-radius: 2px; }
.tier { margin: 0 0 6px; font-size: 13px; color: var(--soft); } .tier b { color: var(--ink); }
.refused { color: #b42318; } .tier + .row { margin-bottom: 16px; } .up { color: #11734b; } .down { color: #b42318; }
table { border-collapse: collapse; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
td, th { padding: 6px 14px; text-align: left; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; } tr.best td { font-weight: 600; }
@media (max-width: 760px) { .query { grid-template-columns: 1fr; } .row { grid-template-columns: repeat(4, 1fr); } }
"""


@dataclass(frozen=True)
class ShownQuery:
    """One query of the page: its picture (PNG), prompt and answers, with the sources' pictures by item id."""

    prompt: str
    image: bytes
    latency_ms: float
    retrieved: Answer
    verified: Answer | None
    verified_seconds: float | None
    thumbnails: dict[int, bytes]
    estimated: Answer | None = None
    estimated_seconds: float | None = None


def _image(png: bytes, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _source(one: Influence, thumbnail: bytes, score: str, share: float, move: str) -> str:
    width = max(2, min(100, round(100 * share)))
    return (
        f'<div class="source">{_image(thumbnail, one.caption)}<div class="bar"><i style="width:{width}%"></i></div>'
        f'<div class="score"><b>{one.rank}</b> {move}<br>{score}</div>'
        f'<div class="caption" title="{escape(one.caption)}">{escape(one.caption)}</div>'
        f'<div class="by" title="{escape(one.creator)}">by {escape(one.creator)}</div></div>'
    )


def _move(one: Influence) -> str:
    """Where the scored item stood in the fast answer, as an arrow."""
    if one.retrieved_rank is None:
        return '<span class="up" title="not among the fast answer’s 40">new</span>'
    if one.retrieved_rank == one.rank:
        return ""
    up = one.retrieved_rank > one.rank
    sign = "▲ from " if up else "▼ from "
    kind = "up" if up else "down"
    return f'<span class="{kind}" title="fast rank {one.retrieved_rank}">{sign}{one.retrieved_rank}</span>'


def _scored(query: ShownQuery, influences: Sequence[Influence], says: str) -> list[str]:
    """A row of sources with τ, under a line that says how they were scored."""
    peak = max((one.tau or 0.0 for one in influences), default=1.0) or 1.0
    return [
        f'<p class="tier">{says}</p>',
        '<div class="row">',
        *(
            _source(
                one, query.thumbnails[one.item_id],
                f"{1e3 * (one.tau or 0):.2f} ± {1e3 * (one.standard_error or 0):.2f}",
                (one.tau or 0) / peak, _move(one),
            )
            for one in influences
        ),
        "</div>",
    ]  # fmt: skip


def _fast_score(one: Influence, named: str | None) -> str:
    score = f"{one.cosine or 0:.3f}"
    return score if named is None else f"{score}<br>{named} {with_interval(one.probability)}"


def _refused(answer: Answer) -> list[str]:
    if not answer.not_attributable:
        return []
    said = escape(f"{refusal(answer)}; these only came nearest")
    return [f'<p class="refused"><b>NOT ATTRIBUTABLE</b>: {said}</p>']


def _query(query: ShownQuery, shown: int = 8) -> str:
    fast = query.retrieved.influences[:shown]
    top = max((one.cosine or 0.0 for one in fast), default=1.0) or 1.0
    named = probability_name(query.retrieved)
    means = "" if named is None else f"; {named}: how likely the teacher puts it there, with its interval"
    rows = [
        f'<p class="tier"><b>RETRIEVED</b> in {query.latency_ms:.0f} ms by release {escape(query.retrieved.release)}; '
        f"the figure is the inner product of the head’s embeddings{means}</p>",
        *_refused(query.retrieved),
        '<div class="row">',
        *(
            _source(one, query.thumbnails[one.item_id], _fast_score(one, named), (one.cosine or 0) / top, "")
            for one in fast
        ),
        "</div>",
    ]
    if query.estimated is not None:
        rows += _scored(
            query, query.estimated.influences[:shown],
            f"<b>ESTIMATED</b> in {query.estimated_seconds or 0:.1f} s: the whole corpus, by one gradient of the query "
            f"({query.estimated.draws} noise draws) against the sketches of all images. τ ± standard error of that "
            "gradient, in thousandths of what was unlearned",
        )  # fmt: skip
    if query.verified is not None:
        rows += _scored(
            query, query.verified.influences[:shown],
            f"<b>VERIFIED</b> in {query.verified_seconds or 0:.0f} s: the fast answer’s candidates, scored by "
            f"unlearning the query ({query.verified.draws} noise draws an image). τ ± standard error, in "
            "thousandths of what was unlearned; the arrow says from which fast rank the image came",
        )  # fmt: skip
    asked = (
        f'<div class="asked">{_image(query.image, query.prompt)}<div class="prompt">{escape(query.prompt)}</div></div>'
    )
    return f'<section class="query">{asked}<div>{"".join(rows)}</div></section>'


def _map_table(result: dict[str, Any]) -> str:
    figures = result["map"]
    rows = [(f"raw {name}", value) for name, value in sorted(figures["raw"].items(), key=lambda kv: kv[1])]
    rows.append((f"head of release {result['releases'][0]['name']}", result["releases"][0]["map"]))
    if len(result["releases"]) > 1:
        rows.append((f"head of release {result['releases'][-1]['name']}", result["releases"][-1]["map"]))
    if figures.get("ceiling") is not None:
        rows.append(("the labels themselves, under other item noise (ceiling)", figures["ceiling"]))
    best = max(value for name, value in rows if name.startswith("head"))
    body = "".join(
        f'<tr class="{"best" if value == best else ""}"><td>{escape(name)}</td><td class="n">{value:.3f}</td></tr>'
        for name, value in rows
    )
    return f"<table><tr><th>order by</th><th>mAP@{figures['L']}</th></tr>{body}</table>"


def _strangers(queries: Sequence[ShownQuery]) -> str:
    if not queries:
        return ""
    refused = sum(bool(query.retrieved.not_attributable) for query in queries)
    return (
        f"<h2>What is not this model’s</h2><p>{len(queries)} pictures that the model did not make from the prompt they "
        f"came with; {refused} of them are answered as not attributable.</p>{''.join(_query(q) for q in queries)}"
    )


def render(result: dict[str, Any], queries: Sequence[ShownQuery], strangers: Sequence[ShownQuery] = ()) -> str:
    """The whole page. ``result`` is what ``reports/demo/result.json`` holds; ``strangers`` are null queries."""
    latency = result["latency_ms"]
    releases = result["releases"]
    figures = [
        (f"{latency['retrieved']:.0f} ms", "a fast answer, end to end over gRPC (median)"),
        *(
            [(f"{latency['estimated'] / 1000:.1f} s", "an estimated answer (sketches of the whole corpus)")]
            if "estimated" in latency
            else []
        ),
        (f"{latency['verified'] / 1000:.0f} s", f"a verified answer ({result['verify']['candidates']} candidates)"),
        (f"{result['speedup']:,.0f}×", "fast against verified, same queries, this machine"),
        (
            f"{result['speedup_over_whole_corpus']:,.0f}×",
            f"fast against verifying all {result['corpus']['items']:,} images (computed: time a candidate × corpus)",
        ),
        (f"{result['map']['head']:.3f}", f"mAP@{result['map']['L']} on {result['map']['queries']} held-out queries"),
        (f"{result['jobs']['succeeded']}/{result['jobs']['submitted']}", "jobs answered, across the swap of releases"),
    ]
    boxes = "".join(f'<div class="figure"><b>{a}</b><span>{escape(b)}</span></div>' for a, b in figures)
    swap = ""
    if len(releases) > 1:
        swap = (
            f"<h2>A better release, swapped in while answering</h2><p>Release {escape(releases[0]['name'])} was "
            f"trained on {releases[0]['labels']} rankings, {escape(releases[-1]['name'])} on {releases[-1]['labels']}. "
            + (
                f"{result['swap']['lookups']} lookups ran meanwhile: {result['swap']['failed']} failed, "
                f"{result['swap']['mixed']} mixed two releases.</p>"
                if result["swap"]["lookups"]
                else "Both were there before this run.</p>"
            )
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Byline: which training images made it possible?</title><style>{STYLE}</style><main>"
        "<h1>Which training images made it possible?</h1>"
        f'<p class="soft">Byline demo: {result["corpus"]["items"]:,} public-domain drawings by '
        f"{result['corpus']['creators']} named artists (Open Clip Art), and a small text-to-image model trained on "
        "them. Each picture below was generated by that model from a held-out prompt.</p>"
        f'<div class="figures">{boxes}</div>'
        f"<h2>Queries and their sources</h2>{''.join(_query(query) for query in queries)}"
        f"{_strangers(strangers)}{swap}"
        f"<h2>How good is the fast order?</h2><p>Held-out queries; positives are the teacher’s top "
        f"{result['map']['L']} of all {result['corpus']['items']:,} images, from noise draws the head was not trained "
        f"on. Chance is {result['map']['L'] / result['corpus']['items']:.3f}.</p>{_map_table(result)}"
        f'<p class="soft">{escape(result["command"])} · {escape(str(result["machine"]["cpu"]))}, '
        f"{result['machine']['cores']} cores · {result['seconds']:.0f} s · commit {escape(result['commit'])}</p>"
        "</main></html>"
    )
