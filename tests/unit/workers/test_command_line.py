"""The command an operator types, and what the parent process may not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.workers.__main__ import parser


@pytest.mark.parametrize("queue", ["lookup", "verification"])
def test_each_queue_has_help_of_its_own(queue: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([queue, "--help"])
    assert ended.value.code == 0
    assert "--metrics-port" in capsys.readouterr().out


def test_a_queue_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([])
    assert ended.value.code == 2
    assert "QUEUE" in capsys.readouterr().err


def test_the_parent_process_imports_neither_torch_nor_faiss() -> None:
    program = (
        "import sys, services.workers.__main__, services.workers.process;"
        "print(sorted({'torch', 'faiss', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
