"""Labels: queries, and the rankings that teachers gave them, kept for ever.

Why it exists: rankings are the most expensive thing the system makes, and the only thing the student learns from.
"""
