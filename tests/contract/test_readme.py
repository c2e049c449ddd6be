"""The README tells the truth: its commands exist, its links lead somewhere, and CI runs its test command."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from byline.cli.app import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")])


def _shell_lines(document: Path) -> list[str]:
    blocks = re.findall(r"^```(?:sh|bash)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _words(line: str) -> list[str]:
    words = shlex.split(line)
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        words.pop(0)
    return words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_in_the_documents_exists(document: Path) -> None:
    wrong = []
    for line in _shell_lines(document):
        words = _words(line)
        if words[:1] == ["make"]:
            wrong += [line for target in words[1:] if "=" not in target and target not in _targets()]
        elif words and words[0].rpartition("/")[2] == "byline":
            wrong += [line] if words[1] not in COMMANDS and not words[1].startswith("-") else []
        elif words[:2] == ["python", "-m"] and words[2].startswith("services."):
            wrong += [line] if not (ROOT / "services" / words[2].split(".")[1]).is_dir() else []
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_between_the_documents_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing, ", ".join(missing)


def test_the_readme_names_the_demo_and_the_test_command_and_ci_runs_the_latter() -> None:
    lines = _shell_lines(ROOT / "README.md")
    assert "make demo" in lines
    assert "make test" in lines
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test\b", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_subcommand_loads_and_has_help(name: str) -> None:
    command = load_command(name)
    assert (command.help or "").strip(), f"byline {name} has no docstring"


def test_the_make_targets_that_must_exist_do() -> None:
    assert {"help", "setup", "protos", "lint", "test", "demo", "up", "down"} <= _targets()
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"  {target} " in shown for target in _targets())


def test_the_lock_pins_every_package_exactly_and_torch_without_a_build() -> None:
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    assert not [pin for pin in pins if pin.startswith(("nvidia-", "torchvision", "triton"))]
