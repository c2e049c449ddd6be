"""How a server process is started."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from byline.embedded import process
from byline.embedded.process import ProcessIdentity, ServerProcess, wait_until


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv (util-linux) is not installed")
def test_a_program_with_threads_forks_no_python_to_start_a_server(tmp_path: Path, monkeypatch) -> None:
    """Python that runs between fork and exec meets locks and libraries of threads that are gone: it crashed."""
    asked: list[object] = []
    popen = subprocess.Popen

    def recorded(*arguments, preexec_fn=None, **options):
        asked.append(preexec_fn)
        return popen(*arguments, preexec_fn=preexec_fn, **options)

    monkeypatch.setattr(process.subprocess, "Popen", recorded)
    started = ServerProcess.start(
        "sleeper", ["sleep", "60"], log=tmp_path / "log", cwd=tmp_path, die_with_parent=True
    )
    started.stop(10.0)
    assert asked == [None]


@pytest.mark.parametrize("setpriv", [True, False])
def test_a_server_ends_with_the_process_that_started_it(tmp_path: Path, setpriv: bool) -> None:
    if setpriv and shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is not installed")
    program = f"""
        import os, shutil, signal
        from pathlib import Path
        from byline.embedded.process import ServerProcess
        if not {setpriv}:
            shutil.which = lambda name: None
        here = Path({str(tmp_path)!r})
        started = ServerProcess.start("s", ["sleep", "600"], log=here / "log", cwd=here, die_with_parent=True)
        (here / "pid").write_text(str(started.identity.pid))
        signal.pause()
    """
    log = tmp_path / "parent.log"
    parent = ServerProcess.start("parent", [sys.executable, "-c", textwrap.dedent(program)], log=log, cwd=tmp_path)
    note = tmp_path / "pid"
    wait_until(lambda: note.is_file() and bool(note.read_text()), 60.0, parent)
    child = ProcessIdentity.of(int(note.read_text()))
    assert child is not None and child.alive()
    still_here = ServerProcess.start("witness", ["sleep", "60"], log=log, cwd=tmp_path)
    parent.popen.kill()
    parent.popen.wait()
    try:
        wait_until(lambda: not child.alive(), 30.0, still_here)
    finally:
        process.kill_tree(child)
        still_here.stop(10.0)
