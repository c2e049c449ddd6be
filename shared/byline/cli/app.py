"""``byline``: finds the command asked for, imports only that one, and prints errors as one readable line.

Why it exists: ``byline --help`` and ``byline submit`` must not wait for torch, so a command's module is
imported when it is called. A module offers a Typer ``app`` (a group such as ``corpus``) or a function
with the command's name.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

from byline.errors import BylineError, InvalidRequest, SettingsInvalid


@dataclass(frozen=True)
class CommandEntry:
    """Where a command lives, and its line in the overview."""

    module: str
    help: str


COMMANDS = {
    "up": CommandEntry("byline.cli.up", "Start the servers and services, wait until they can be used."),
    "down": CommandEntry("byline.cli.up", "Stop what `byline up` started; data is kept."),
    "status": CommandEntry("byline.cli.status", "What runs, which release answers, how long the queues are."),
    "submit": CommandEntry("byline.cli.submit", "Ask which training images made an image possible."),
    "watch": CommandEntry("byline.cli.submit", "Follow a job until it ends."),
    "show": CommandEntry("byline.cli.show", "Show a job's answer: table, HTML page or JSON."),
    "corpus": CommandEntry("byline.cli.corpus", "Ingest, list and withdraw corpus items."),
    "labels": CommandEntry("byline.cli.labels", "Import, export and count rankings."),
    "curation": CommandEntry("byline.cli.curation", "What labelling may spend: status, pause, resume, budget."),
    "drift": CommandEntry("byline.cli.drift", "How student and teacher agree on what clients ask, over time."),
    "sketches": CommandEntry("byline.cli.sketches", "Fit and show the sketches behind estimated answers."),
    "releases": CommandEntry("byline.cli.releases", "List, activate and roll back releases."),
    "keys": CommandEntry("byline.cli.keys", "Make, list and revoke API keys."),
    "audit": CommandEntry("byline.cli.audit", "Look at the audit and check its hash chain."),
    "admin": CommandEntry("byline.cli.admin", "Queues, workers, dead jobs; pause, resume, drain."),
    "doctor": CommandEntry("byline.cli.doctor", "What is wrong with this installation, and what to do."),
    "backup": CommandEntry("byline.cli.backup", "Make, verify and restore backups."),
    "evaluate": CommandEntry("byline.cli.evaluate", "Held-out quality of heads and raw features."),
    "study": CommandEntry("byline.cli.study", "Features, losses, pruning, teachers, dimensions, labels: the studies."),
    "demo": CommandEntry("byline.cli.demo", "The whole path on real images, with a page to look at."),
}


class LazyGroup(TyperGroup):
    """A group whose commands are placeholders until one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Replace the placeholder of the command asked for by the real one."""
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = load_command(args[0])
            _configure_logging()
        return super().resolve_command(ctx, args)


def load_command(name: str) -> Any:
    """Import the module of a command and return it as something Typer can run."""
    module = importlib.import_module(COMMANDS[name].module)
    group = getattr(module, "app", None)
    if not isinstance(group, typer.Typer):
        group = typer.Typer(add_completion=False)
        group.command(name, help=None)(getattr(module, name))
    command = typer.main.get_command(group)
    command.name = name
    return command


def _configure_logging() -> None:
    from byline.config import load_settings
    from byline.telemetry import configure_logging

    configure_logging("cli", load_settings())


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"byline {version('byline')}")
        raise typer.Exit


def build_app() -> typer.Typer:
    """The command with a placeholder for each subcommand."""
    app = typer.Typer(
        cls=LazyGroup, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help="Byline names the training images that made a generated image possible.",
    )

    @app.callback()
    def root(
        version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    ) -> None:
        """Byline names the training images that made a generated image possible."""

    for name, entry in COMMANDS.items():
        app.command(name, help=entry.help)(_placeholder)
    return app


def _placeholder() -> None:
    """Stands for a command in the overview; LazyGroup replaces it before it could be called."""


def main() -> None:
    """Entry point of the console script. Exit codes: 0 done, 1 failed, 2 wrong usage or settings."""
    try:
        build_app()()
    except BylineError as error:
        print(f"byline: {error.message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (InvalidRequest, SettingsInvalid)) else 1)
    except BrokenPipeError:
        # `byline ... | head`: nobody reads any more. Without this Python complains again at exit.
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
