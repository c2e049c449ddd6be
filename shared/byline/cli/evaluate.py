"""``byline evaluate``: what heads, their probabilities and teachers are worth: a table, a JSON file and a figure.

Why it exists: one group for every judgement, and one place that says which there are.
"""

from __future__ import annotations

import typer

from byline.cli.evaluate_calibration import calibration
from byline.cli.evaluate_head import head
from byline.cli.evaluate_retraining import counterfactual, lds
from byline.cli.evaluate_teacher import teacher

app = typer.Typer(help="Judge heads and teachers; every result is a JSON file under reports/.", no_args_is_help=True)


app.command()(head)
app.command()(calibration)
app.command()(lds)
app.command()(counterfactual)
app.command()(teacher)


@app.callback()
def group() -> None:
    """Judge heads and teachers; every result is a JSON file under reports/."""
