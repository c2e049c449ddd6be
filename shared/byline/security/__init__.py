"""Who may do what, what was done, and what may be opened.

Why it exists: keys, scopes, limits, the audit's chain, signatures, bounded decoding and retention each are a small
module of their own here, known to the gateway, the workers and the command line alike. ``docs/security.md`` says what
they protect and what they do not.
"""
