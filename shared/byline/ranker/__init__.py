"""The student: a head that predicts, from frozen features, the order a teacher would give.

Why it exists: the teacher needs minutes per query, an inner product needs microseconds. Everything that
turns rankings into such an inner product is here; nothing here knows of jobs, databases or releases.
"""
