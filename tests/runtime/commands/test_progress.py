"""Long runs: a bar on a terminal, lines elsewhere; here of vptq-perplexity."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from vptq_runtime.commands import progress
from vptq_runtime.commands.progress import RunProgress
from vptq_runtime.evaluate import cli as perplexity_cli

COMMAND = [str(Path(sys.executable).with_name("vptq-perplexity"))]  # as installed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox and the lazy dog\n" * 100)
    return path


def test_the_time_left_goes_by_what_this_run_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a unit takes minutes; a line is told when the last one is LINE_S old."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    with RunProgress(100, 40, lines.append) as run:
        for seconds, name in ((29, "a"), (1, "b"), (29, "c"), (120, "d")):
            now[0] += seconds
            run.advance(name, 10)
    # 20 of 60 after 30 s; 40 after 179 s.
    assert lines == ["b; 60% done, about 0:01:00 left", "d; 80% done, about 0:01:30 left"]


def test_lines_without_a_terminal(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0)
    assert perplexity_cli.main(["-m", str(model), str(text), "-c", "100", "--windows", "3"]) == 0
    *lines, _ = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for n, line in enumerate(lines, 1):
        share = round(100 * n / 3)
        assert re.fullmatch(rf"perplexity [\d.]+( ± [\d.]+)?; {share}% done, about 0:0\d:\d\d left", line)


def test_a_bar_on_a_terminal(model: Path, text: Path) -> None:
    """With the estimate so far; none of it reaches standard output."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "-m", str(model), str(text), "-c", "64"],
        stdout=subprocess.PIPE,
        stderr=slave,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(slave)
    shown = b""
    while select.select([master], [], [], 60)[0]:
        try:
            shown += os.read(master, 4096)
        except OSError:  # what Linux says at the end
            break
    assert process.stdout is not None
    output = process.stdout.read().decode()
    assert process.wait(60) == 0
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"100% 0:00:00 perplexity [\d.]+ ± [\d.]+", plain)
    assert re.fullmatch(r"[^\n\x1b]*: perplexity [^\n\x1b]*\npapers: [^\n\x1b]*\n", output)
