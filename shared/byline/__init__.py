"""Byline: which training images made a generated image possible. The method and the infrastructure, as a library."""
