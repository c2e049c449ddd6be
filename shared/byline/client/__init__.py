"""The Python client of Byline: ``Client`` and ``AsyncClient``.

Why it exists: asking which images made an image possible should take one line and no knowledge of gRPC::

    from byline.client import Client

    with Client("127.0.0.1:50551") as client:
        for influence in client.attribute("cat.png", prompt="a cat"):
            print(influence.rank, influence.caption, influence.creator)

All values are frozen dataclasses of this package; all errors are the typed ones of ``byline.errors``.
"""

from byline.client.aio import AsyncClient
from byline.client.connection import tls
from byline.client.sync import Client
from byline.client.values import (
    ActiveRelease,
    Answer,
    Attribution,
    CreatorShare,
    Credit,
    ImageSource,
    Influence,
    Job,
    Probability,
    Problem,
    QueueStatus,
    Release,
    Sketches,
    StageStatus,
    Withdrawal,
    WorkerStatus,
)

__all__ = [
    "ActiveRelease",
    "Answer",
    "AsyncClient",
    "Attribution",
    "Client",
    "CreatorShare",
    "Credit",
    "ImageSource",
    "Influence",
    "Job",
    "Probability",
    "Problem",
    "QueueStatus",
    "Release",
    "Sketches",
    "StageStatus",
    "Withdrawal",
    "WorkerStatus",
    "tls",
]
