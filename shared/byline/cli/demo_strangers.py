"""The demo's null queries: pictures that the model did not make from the prompt that comes with them.

Why it exists: whoever judges an attribution by looking should also see it refuse. Two kinds: a photograph under a
prompt the corpus knows, and the demo's own pictures under each other's prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from byline.cli.demo_page import ShownQuery
from byline.client import Client


def strangers(asked: Sequence[tuple[bytes, str]]) -> list[tuple[bytes, str]]:
    """(picture as PNG, prompt): a photograph with the first prompt, and the first picture with the last prompt."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from byline.catalog.decode import encode_png

    photograph = Image.fromarray(load_sample_images().images[0])
    side = min(photograph.size)
    square = photograph.crop((0, 0, side, side)).resize((256, 256), Image.Resampling.BOX)
    (first, prompt), (_, other) = asked[0], asked[-1]
    return [(encode_png(square), prompt), *([(first, other)] if other != prompt else [])]


def shown_strangers(
    client: Client, asked: Sequence[tuple[bytes, str]], answers: Sequence[tuple[Any, float]]
) -> list[ShownQuery]:
    """Null queries for the page; ``answers`` are attributions with their milliseconds."""
    return [
        ShownQuery(prompt=prompt, image=image, latency_ms=milliseconds, retrieved=short(attribution.answer),
                   verified=None, verified_seconds=None, thumbnails=thumbnails(client, [attribution]))
        for (image, prompt), (attribution, milliseconds) in zip(asked, answers, strict=True)
    ]  # fmt: skip


def thumbnails(client: Client, answers: Sequence[Any]) -> dict[int, bytes]:
    """The pictures of the first eight items of each answer, by item id."""
    wanted = {one.item_id: one.name for answer in answers for one in answer.influences[:8]}
    return {item_id: client.item_image(name) for item_id, name in wanted.items()}


def short(answer: Any) -> Any:
    """The answer with its release's bare id, for people."""
    return replace(answer, release=answer.release.rpartition("/")[2])
