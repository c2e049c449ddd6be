"""Curation: decides which queries to label next and keeps the verification queue fed with them."""
