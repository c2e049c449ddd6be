"""The trainer: when enough new rankings are there, fit a head, judge it, and publish it as a release.

Why it exists: the student must follow the teacher while corpus and questions change, and nobody should have to press
a button for that, nor be surprised by a worse head: every candidate passes a gate, and a refused one is recorded.
"""
