"""Celery workers: the lookup queue (student, milliseconds) and the verification queue (teacher, minutes)."""
