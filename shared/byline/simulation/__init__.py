"""A year of the loop on a simulated clock: traffic that shifts, artists who come and go, labels, heads, releases.

Why it exists: what curation, trainer and gate do together over months cannot be seen in a test of any of them.
"""
