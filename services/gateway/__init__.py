"""The gateway: the gRPC API of Byline.

Why it exists: it validates, commits a row and streams changes. It never decodes an image, never waits on
the queue and never imports torch or faiss, so it starts in a second and stays small.
"""
