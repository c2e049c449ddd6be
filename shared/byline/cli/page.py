"""One job as a self-contained web page: the query, its sources as pictures, fast rank beside verified rank.

Why it exists: a page that can be mailed to a maker or kept as a record must not depend on a server; every
picture is inside the file, every word of a caption is escaped, and nothing is fetched.
"""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from byline.cli.show import probability_name, verdict_line, with_error, with_interval
from byline.client import Answer, Influence, Job

_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"))
_STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1c;--soft:#666;--line:#ddd;--card:#fff;--page:#f6f5f2}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--soft:#aaa;--line:#444;--card:#222;--page:#161616}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;padding:2rem;
max-width:72rem}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.1rem;margin:2rem 0 .25rem}
.soft{color:var(--soft);font-size:.875rem;margin:0}.query{display:flex;gap:1.5rem;align-items:center}
.query img{width:160px;height:160px;object-fit:contain;background:#fff;border:1px solid var(--line);border-radius:8px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:1rem;margin-top:1rem;padding:0}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure img,.none{width:100%;aspect-ratio:1;object-fit:contain;background:#fff;display:block}
.none{display:grid;place-items:center;color:#888}figcaption{padding:.6rem .75rem;font-size:.875rem}
.rank{font-weight:600}.up{color:#18794e}.down{color:#b54708}.warn{padding:.75rem 1rem;border-left:4px solid #b54708}
dl{display:grid;grid-template-columns:auto 1fr;gap:0 .75rem;margin:.4rem 0 0}
dt{color:var(--soft)}dd{margin:0;text-align:right}
"""


def write_page(path: Path, job: Job, query: bytes | None, items: dict[int, bytes]) -> None:
    """Write the page of a job; ``items`` has the image file of each item id that is to be shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(job, query, items), encoding="utf-8")


def page(job: Job, query: bytes | None, items: dict[int, bytes]) -> str:
    """The page as text."""
    title = escape(job.prompt or "Image without prompt")
    sections = "".join(_section(answer, items) for answer in reversed(job.answers))
    if not sections:
        why = f"{job.error.reason}: {job.error.message}" if job.error else "no answer yet"
        sections = f'<p class="warn">{escape(job.state)} – {escape(why)}</p>'
    if job.verification_error is not None:
        problem = f"{job.verification_error.reason}: {job.verification_error.message}"
        sections = f'<p class="warn">Not verified – {escape(problem)}</p>' + sections
    made = job.create_time.isoformat(timespec="seconds") if job.create_time else ""
    picture = f'<img src="{_data_url(query)}" alt="The generated image">' if query else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Sources of: {title}</title><style>{_STYLE}</style>"
        f'<div class="query">{picture}<div><h1>{title}</h1>'
        f'<p class="soft">{escape(job.model)} · asked {escape(made)} · job {escape(job.id)}</p></div></div>'
        f"{sections}</html>\n"
    )


def _section(answer: Answer, items: dict[int, bytes]) -> str:
    heading = {"RETRIEVED": "Retrieved", "ESTIMATED": "Estimated", "VERIFIED": "Verified"}.get(answer.tier, answer.tier)
    named = probability_name(answer)
    figures = "".join(_figure(influence, items.get(influence.item_id), named) for influence in answer.influences)
    note = f"{verdict_line(answer)} · release {answer.release.rpartition('/')[2]} · higher means more influential"
    return f'<h2>{escape(heading)}</h2><p class="soft">{escape(note)}</p><div class="grid">{figures}</div>'


def _figure(influence: Influence, image: bytes | None, probability: str | None) -> str:
    caption = escape(influence.caption or f"item {influence.item_id}")
    picture = f'<img src="{_data_url(image)}" alt="{caption}">' if image else '<div class="none">no picture</div>'
    rows = [("score", "" if influence.cosine is None else f"{influence.cosine:.3f}")]
    rows.append(("τ", with_error(influence.tau, influence.standard_error)))
    if probability is not None:
        rows.append((probability, with_interval(influence.probability)))
    rows.append(("licence", influence.licence))
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows if text)
    return (
        f'<figure>{picture}<figcaption><span class="rank">{influence.rank}</span> {_move(influence)} {caption}'
        f'<br><span class="soft">by {escape(influence.creator or "unknown")}</span><dl>{facts}</dl>'
        "</figcaption></figure>"
    )


def _move(influence: Influence) -> str:
    """How far the teacher moved the item from its retrieved rank; nothing for a retrieved answer."""
    if influence.tau is None or influence.retrieved_rank == influence.rank:
        return ""
    if influence.retrieved_rank is None:
        return '<span class="up" title="not among the retrieved">▲ new</span>'
    moved = influence.retrieved_rank - influence.rank
    kind, arrow = ("up", "▲") if moved > 0 else ("down", "▼")
    return f'<span class="{kind}" title="retrieved at {influence.retrieved_rank}">{arrow}{abs(moved)}</span>'


def _data_url(data: bytes) -> str:
    media_type = next((name for magic, name in _MAGIC if data.startswith(magic)), "application/octet-stream")
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
