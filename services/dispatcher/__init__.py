"""The dispatcher: turns rows that wait into doorbells, and takes back what went wrong.

Why it exists: see ``services.dispatcher.dispatch``. Run it with ``python -m services.dispatcher``.
"""
