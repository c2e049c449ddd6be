"""The system under attack: load, faults, the history of both, and a checker that reads it afterwards.

Why it exists: the promises of docs/jobs.md are about what happens when things die. ``byline.chaos.run`` kills real
processes under real load and writes down everything; ``byline.chaos.checker`` is pure and says what the history breaks.
"""
