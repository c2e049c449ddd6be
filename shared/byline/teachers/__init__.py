"""Teachers: slow methods that score the influence of corpus items on one query.

``load_teacher`` gives one by name; ``Ranking`` is what every one of them returns. Higher τ means
more influential, everywhere.
"""

from byline.teachers.ranking import Ranking, Teacher, TeacherItem, TeacherQuery
from byline.teachers.recipes import TEACHERS
from byline.teachers.registry import load_teacher

__all__ = ["TEACHERS", "Ranking", "Teacher", "TeacherItem", "TeacherQuery", "load_teacher"]
