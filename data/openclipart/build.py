"""Build the demo corpus from the Debian packages of Open Clip Art.

Why it exists: the pictures live in one package and their captions, creators and licences in the
RDF block of another; both carry files one would not show in public, byte duplicates, and recoloured
series that would inflate every score. This script is the only place where that is decided, and
running it twice gives the same bytes.

    apt-get download openclipart-png openclipart-svg
    for deb in openclipart-*.deb; do dpkg-deb -x "$deb" unpacked; done
    python data/openclipart/build.py unpacked/usr/share/openclipart data/openclipart

Writes ``items.parquet`` (one row an image, PNG bytes included), ``dropped.csv`` (every file left out
and why) and ``MANIFEST.json`` (counts and sha256 of both).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 64
MAX_PIXELS = 40_000_000
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
LICENCE_URL = "http://web.resource.org/cc/PublicDomain"
SOURCE = "https://openclipart.org/ via Debian openclipart 1:0.18+dfsg-19"

# A coherent corpus: themes of recognisable objects that give a prompt several plausible sources.
# Left out: interface icons, geometric shapes, gradients and patterns, LED digits, outline maps,
# unsorted files.
THEMES = (
    "animals", "buildings", "containers", "decorations", "education", "electronics", "food",
    "office", "people", "plants", "recreation", "science", "signs_and_symbols",
    "tools", "transportation",
)  # fmt: skip
EXCLUDED_FOLDERS = (
    "signs_and_symbols/led", "tools/weapons", "people/bodypart", "people/clothing/pantyhose",
)  # fmt: skip
# Files lying directly in these folders are a mixed bag of portraits and diagrams; their subfolders stay.
EXCLUDED_TOP_LEVEL = ("people", "signs_and_symbols")
# Hair-line drawings vanish at the generator's 32 pixels: what remains there must have some ink.
MIN_INK = 0.035
SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
COURT = {"a": "ace", "j": "jack", "q": "queen", "k": "king"}

# Not for a public demo: risque figures, weapons, hate symbols, trademarks.
UNSUITABLE = re.compile(
    r"\b(nude|naked|sexy|sex|erotic|porn\w*|breasts?|bikini|lingerie|pin.?up|burlesque|stripper|"
    r"guns?|rifles?|pistols?|revolvers?|weapons?|bombs?|grenades?|missiles?|swords?|daggers?|knife "
    r"fight|ak.?47|kalashnikov|tanks?|bullets?|ammunition|nazi\w*|swastika|reich|"
    r"cigarettes?|cigars?|marijuana|cannabis|drugs?|suicide|corpse|gallows|noose|guillotine|"
    r"logos?|trademarks?|coca.?cola|pepsi|mcdonald\w*|disney|mickey|pokemon|nintendo|playstation|"
    r"xbox|microsoft|windows xp|ibm|apple computer|ipod|imac|macintosh|google|mozilla|firefox|"
    r"linux|ubuntu|debian|red ?hat|gnome|kde|tux|star ?wars|batman|superman|ferrari|porsche|"
    r"volkswagen|bmw|nokia|motorola|sony|adidas|nike|lego)\b"
)
GENERIC = re.compile(
    r"\b(themes?|collection|icons?|submissions?|sibmission|clip ?arts?|various|untitled|unknown|"
    r"symbol signs|drawing|image|picture|new document|svg)\b"
)
CATALOGUE_WORDS = {
    "hash", "icon", "icons", "theme", "unsorted", "clip_art", "clipart", "clip art", "svg", "png",
    "image", "public domain", "externalsource", "open clip art", "signs and symbols",
    "signs_and_symbols", "contour", "lemon-theme", "media", "newton",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One kept image. ``group`` ties recolours and series: it, not the image, is split."""

    item_id: int
    caption: str
    keywords: tuple[str, ...]
    creator: str
    licence: str
    source_path: str
    image: bytes
    sha256: str
    group: int


def clean(text: str | None) -> str:
    """Lower case, underscores to spaces, one space between words."""
    return " ".join(re.sub(r"[_\s]+", " ", text or "").strip().lower().split())


@dataclass(frozen=True)
class Metadata:
    """What the RDF block of one SVG says; empty strings where it says nothing."""

    title: str
    creator: str
    licence: str
    keywords: list[str]


def read_metadata(svg: Path) -> Metadata:
    """Title, creator, licence URL and keywords from the RDF block of an SVG file."""
    raw = svg.read_bytes()
    if svg.suffix == ".svgz" or raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    title = creator = licence = ""
    keywords: list[str] = []
    for work in ET.fromstring(raw).iter():  # noqa: S314 (files of a signed Debian package)
        if not work.tag.endswith("}Work"):
            continue
        for field in work:
            name = field.tag.rsplit("}", 1)[-1]
            if name == "title":
                title = clean(field.text)
            elif name == "creator":
                # Some wrote their e-mail address behind the name; a credit line needs the name alone.
                creator = re.sub(r"[\[(<]?\S+@\S+", "", "".join(field.itertext()))
                creator = " ".join(creator.split())
            elif name == "license":
                licence = field.get(RDF + "resource", "")
            elif name == "subject":
                keywords = [clean(li.text) for li in field.iter(RDF + "li") if re.match(r"[^\W\d]", clean(li.text))]
                keywords = [k for k in keywords if "(0x" not in k]
        break
    return Metadata(title, creator, licence, keywords)


def stem_caption(path: Path, creator: str) -> str:
    """The file name as words, without the author's name and the running number."""
    words = clean(re.sub(r"[-.]", " ", path.stem)).split()
    author = {part for part in re.split(r"\W+", creator.lower()) if len(part) > 2}
    kept = [w for w in words if w not in author and not any(w[:4] == a[:4] and len(w) > 4 for a in author)]
    text = re.sub(r"0*\d+$", "", " ".join(kept or words)).strip()
    return re.sub(r"\b\w$", "", text).strip() or " ".join(words)


def make_caption(title: str, path: Path, creator: str, keywords: list[str], common: set[str]) -> str:
    """An informative title, else the file stem; then up to four keywords that add something."""
    card = re.fullmatch(r"(\w+?)_([cdhs])_(\w+)", path.stem)
    if card and "/cards/" in path.as_posix():
        style, suit, face = card.groups()
        return f"{COURT.get(face, face)} of {SUITS[suit]} playing card ({style} style)"
    skeleton = re.sub(r"\d+", "", title).strip()
    informative = len(skeleton) >= 3 and not GENERIC.search(title) and skeleton not in common
    head = title if informative else stem_caption(path, creator)
    added = [
        k for k in dict.fromkeys(keywords)
        if k not in CATALOGUE_WORDS and len(k) > 2 and not any(w in head for w in (k, k.rstrip("s")))
    ][:4]  # fmt: skip
    return f"{head} ({', '.join(added)})" if added else head


def render(png: Path) -> Image.Image:
    """Crop to the alpha box, composite on white, fit into SIDE x SIDE with a small margin."""
    with Image.open(png, formats=("PNG",)) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width}x{opened.height} pixels is over the limit {MAX_PIXELS}")
        picture = opened.convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise ValueError("fully transparent")
    picture = picture.crop(box)
    if max(picture.size) < 24:
        raise ValueError(f"only {picture.width}x{picture.height} pixels")
    inner = SIDE - 4
    scale = inner / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    flat = Image.new("RGBA", picture.size, "white")
    flat.alpha_composite(picture)
    small = flat.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(small, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    ink = 1 - np.asarray(canvas.convert("L"), dtype=np.float32).mean() / 255
    if ink < MIN_INK:
        raise ValueError(f"only {ink:.3f} of the picture is ink")
    return canvas


def structure(image: Image.Image) -> np.ndarray:
    """A colour-blind signature: gradient directions of the luminance, unit norm; [2 * 16 * 16]."""
    grey = np.asarray(image.convert("L").resize((17, 17), Image.Resampling.BOX), dtype=np.float32)
    dx, dy = np.diff(grey, axis=1)[:16], np.diff(grey, axis=0)[:, :16]
    magnitude = np.stack([np.abs(dx), np.abs(dy)]).ravel()
    return magnitude / (np.linalg.norm(magnitude) + 1e-6)


def series_key(path: str, creator: str) -> str:
    """Files that differ only in their number, by the same hand in the same folder, are a series."""
    folder, name = path.rsplit("/", 1)
    return f"{folder}/{re.sub(r'[0-9]+', '#', Path(name).stem)}/{creator}"


def group_near_duplicates(items: list[Item], images: list[Image.Image]) -> list[Item]:
    """Union recolours (same structure), numbered series and near-identical pixels.

    The group id is the smallest item id in it, so that adding an image never renames other groups.
    """
    parent = list(range(len(items)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    signatures = np.stack([structure(im) for im in images])  # [n, 512]
    thumbs = np.stack(
        [np.asarray(im.resize((12, 12), Image.Resampling.BOX), np.float32).ravel() for im in images]
    )  # [n, 432]
    thumbs -= thumbs.mean(1, keepdims=True)
    thumbs /= np.linalg.norm(thumbs, axis=1, keepdims=True) + 1e-6
    # Flags share their frame, so structure alone would chain them: they need equal pixels too.
    same_structure = signatures @ signatures.T > 0.985
    same_pixels = thumbs @ thumbs.T > 0.985
    close_both = (signatures @ signatures.T > 0.93) & (thumbs @ thumbs.T > 0.95)
    is_flag = np.array(["/flags/" in it.source_path for it in items])
    either_flag = is_flag[:, None] | is_flag[None, :]
    linked = np.where(either_flag, same_structure & same_pixels, same_structure | same_pixels | close_both)
    for i, j in zip(*np.nonzero(np.triu(linked, 1)), strict=True):
        parent[find(int(i))] = find(int(j))
    series: dict[str, int] = {}
    for i, item in enumerate(items):
        key = series_key(item.source_path, item.creator)
        if key in series:
            parent[find(i)] = find(series[key])
        series.setdefault(key, i)
    smallest: dict[int, int] = {}
    for i, item in enumerate(items):
        smallest[find(i)] = min(item.item_id, smallest.get(find(i), item.item_id))
    return [replace(item, group=smallest[find(i)]) for i, item in enumerate(items)]


def select(root: Path) -> tuple[list[Item], list[Image.Image], list[tuple[str, str]]]:
    """Every kept item in path order, its picture, and (path, reason) of every dropped file."""
    found: list[tuple[Path, str, Metadata]] = []
    dropped: list[tuple[str, str]] = []
    svgs = {p.relative_to(root / "svg").with_suffix("").as_posix(): p for p in (root / "svg").rglob("*.svg*")}
    for png in sorted((root / "png").rglob("*.png")):
        path = png.relative_to(root / "png")
        key = path.with_suffix("").as_posix()
        mixed_bag = len(path.parts) == 2 and path.parts[0] in EXCLUDED_TOP_LEVEL
        if path.parts[0] not in THEMES or key.startswith(EXCLUDED_FOLDERS) or mixed_bag:
            dropped.append((path.as_posix(), "theme left out"))
        elif key not in svgs:
            dropped.append((path.as_posix(), "no metadata"))
        else:
            found.append((png, path.as_posix(), read_metadata(svgs[key])))
    skeletons = Counter(re.sub(r"\d+", "", metadata.title).strip() for _, _, metadata in found)
    common = {s for s, n in skeletons.items() if n >= 8}
    items: list[Item] = []
    images: list[Image.Image] = []
    seen_files: set[str] = set()
    seen_pixels: set[str] = set()
    for png, source_path, metadata in found:
        title, creator, keywords = metadata.title, metadata.creator, metadata.keywords
        licence, reason = metadata.licence, ""
        caption = make_caption(title, Path(source_path), creator, keywords, common)
        digest = hashlib.sha256(png.read_bytes()).hexdigest()
        unsuitable = UNSUITABLE.search(" ".join([caption, title, clean(source_path.replace("/", " ")), *keywords]))
        if licence != LICENCE_URL:
            reason = f"licence {licence or 'not stated'}"
        elif not creator or creator.lower() in {"unknown", "anonymous", "none"}:
            reason = "no named creator"
        elif unsuitable:
            reason = f"unsuitable for a public demo: {unsuitable.group(0)}"
        elif digest in seen_files:
            reason = "byte duplicate"
        elif sum(c.isalpha() for c in caption) < 3:
            reason = "no caption"
        if not reason:
            try:
                image = render(png)
            except (ValueError, OSError, Image.DecompressionBombError) as error:
                reason = f"unusable: {error}"
            else:
                pixels = hashlib.sha256(image.tobytes()).hexdigest()
                reason = "pixel duplicate" if pixels in seen_pixels else ""
                seen_pixels.add(pixels)
        if reason:
            dropped.append((source_path, reason))
            continue
        seen_files.add(digest)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        item_id = int.from_bytes(hashlib.sha256(f"openclipart/{source_path}".encode()).digest()[:8], "big") >> 1
        items.append(
            Item(item_id, caption, tuple(k for k in keywords if k not in CATALOGUE_WORDS), creator,
                 "public domain", source_path, buffer.getvalue(),
                 hashlib.sha256(buffer.getvalue()).hexdigest(), item_id)
        )  # fmt: skip
        images.append(image)
    return items, images, dropped


SCHEMA = pa.schema(
    [
        ("item_id", pa.int64()), ("caption", pa.string()), ("keywords", pa.list_(pa.string())),
        ("creator", pa.string()), ("licence", pa.string()), ("source", pa.string()),
        ("source_path", pa.string()), ("sha256", pa.string()), ("near_duplicate_group", pa.int64()),
        ("image", pa.binary()),
    ]
)  # fmt: skip


def write(items: list[Item], dropped: list[tuple[str, str]], out: Path) -> dict[str, object]:
    """Write the Parquet file, the list of what was dropped and the manifest; return the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "item_id": it.item_id, "caption": it.caption, "keywords": list(it.keywords), "creator": it.creator,
            "licence": it.licence, "source": SOURCE, "source_path": it.source_path, "sha256": it.sha256,
            "near_duplicate_group": it.group, "image": it.image,
        }
        for it in items
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), out / "items.parquet", compression="zstd")
    with (out / "dropped.csv").open("w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["source_path", "reason"])
        # The themes left out are listed in this script; a line for each of their files adds nothing.
        writer.writerows(row for row in sorted(dropped) if row[1] != "theme left out")
    reasons = Counter(re.split(r"[:]| http", reason)[0] for _, reason in dropped)
    # The digest of the rows, not of the file: Parquet bytes depend on the version of its writer.
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps({k: v for k, v in row.items() if k != "image"}, sort_keys=True).encode())
    manifest: dict[str, object] = {
        "name": "openclipart", "items": len(items), "creators": len({it.creator for it in items}),
        "captions": len({it.caption for it in items}), "near_duplicate_groups": len({it.group for it in items}),
        "side": SIDE, "licence": "public domain", "source": SOURCE, "rows_sha256": content.hexdigest(),
        "dropped": dict(sorted(reasons.items())),
    }  # fmt: skip
    (out / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> None:
    """Build the corpus from the command line's folders."""
    # The size limit is ours (MAX_PIXELS), checked from the header before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the unpacked openclipart folder that holds png/ and svg/")
    parser.add_argument("out", type=Path, help="where items.parquet, dropped.csv and MANIFEST.json go")
    arguments = parser.parse_args()
    items, images, dropped = select(arguments.root)
    print(json.dumps(write(group_near_duplicates(items, images), dropped, arguments.out), indent=2))


if __name__ == "__main__":
    main()
