"""How well an order predicts the teacher's order, and whether a difference is more than chance.

Why it exists: every claim of the project is one of these numbers; they are pure functions of arrays.
"""
