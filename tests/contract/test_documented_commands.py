"""Every command on the pages for operators exists, with those options: people copy them at night."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from byline.cli.app import COMMANDS, build_app, load_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "docs" / "operations.md", ROOT / "docs" / "runbooks.md", ROOT / "deploy" / "README.md")
#: What stands before a command of ours in another program's line.
WRAPPERS = (
    r"docker compose -f deploy/compose\.yaml run --rm (?:-e \w+ )?tools ",
    r"kubectl -n byline exec deploy/gateway -- (?:env \S+ )?byline ",
)


def commands() -> Iterator[tuple[str, str]]:
    """(where, command) of every line of ours: in blocks, and between backticks."""
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(byline [a-z][^`]*)`", re.sub(r"```sh\n.*?```", "", text, flags=re.DOTALL))
        for line in lines:
            for wrapper in WRAPPERS:
                line = re.sub(f"^{wrapper}", "byline ", line)
            if line.startswith(("byline ", "python -m services.")):
                yield page.name, line


def problem(line: str) -> str | None:
    """Why this line would fail before it did anything, or None."""
    words = shlex.split(line, comments=True)
    if words[0] == "python":
        return program_problem(words[2], words[3:])
    words = words[1:]
    command: Any = get_command(build_app())
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            break
        name, words = words[0], words[1:]
        shared = name in COMMANDS and (command.name in ("admin", None) or "corpus" in command.commands)
        if name not in command.commands and not shared:
            return f"{command.name} has no command {name}"
        command = load_command(name) if shared else command.commands[name]
    options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options | {"--help"}]
    return f"{command.name} has no option {', '.join(unknown)}" if unknown else None


def program_problem(module: str, arguments: list[str]) -> str | None:
    import importlib

    program = importlib.import_module(f"{module}.__main__")
    try:
        getattr(program, "parser", getattr(program, "_parser", None))().parse_args(arguments)
    except SystemExit:
        return f"{module} refuses {arguments}"
    return None


def test_every_command_on_the_operators_pages_exists_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(commands())
    assert len(found) > 80
    wrong = [f"{page}: {line}: {why}" for page, line in dict.fromkeys(found) if (why := problem(line))]
    assert not wrong, "\n".join(wrong)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert problem("byline admin jobs forget JOB")
    assert problem("byline admin queues --quietly")
    assert problem("byline sing")
    assert problem("python -m services.workers tea")
    assert problem("byline admin jobs dead --limit 5  # a comment") is None
    assert problem('byline admin releases rollback --reason "x"') is None


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)?(?:#[^)]*)?\)", page.read_text()):
            assert not target or (page.parent / target).exists(), f"{page.name}: {target}"
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
            headings = re.findall(r"^#+ (.*)$", (page.parent / (target or page.name)).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}#{anchor}"
