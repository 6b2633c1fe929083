"""tools/compare_plans.py: a uniform model, a plan of its size, and their verdicts."""

import json
import sys
from pathlib import Path

import pytest
from dense_models import SEQ_LEN, write_dense, write_text

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import compare_plans


def test_a_plan_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan is the better one; a second call prints the same without any work."""
    model, out = write_dense(tmp_path / "dense", "llama"), tmp_path / "out"
    text = write_text(tmp_path / "text.txt")
    sizes = ["--samples", "16", "--seq-len", str(SEQ_LEN), "--quants", "v4-k64-0", "--md"]
    command = [str(model), str(out), "--calibration", str(text), *sizes]
    assert compare_plans.main(command) == 0
    printed = capsys.readouterr().out
    row = [cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")]
    uniform, plan = (
        json.loads((out / name / "report.json").read_text()) for name in ("v4-k64-0", "v4-k64-0-plan")
    )
    assert 0.98 * uniform["bits_per_weight"] < plan["bits_per_weight"] <= uniform["bits_per_weight"]
    losses = [report["verdict"]["kl_divergence"] for report in (uniform, plan)]
    assert row[0] == "v4-k64-0" and [float(row[2]), float(row[4])] == pytest.approx(losses, abs=1e-4)
    assert float(row[5]) < 1
    monkeypatch.delattr(compare_plans, "quantize")
    assert compare_plans.main(command) == 0
    assert capsys.readouterr().out == printed
