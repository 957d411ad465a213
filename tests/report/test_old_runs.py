"""Runs that fc94876 wrote are reported on."""

from jit_accel.report import main


def test_runs_of_before_have_a_report(old_folders, tmp_path):
    page = tmp_path / "report.html"
    assert main(["run", "muon", "stream", "--output", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert all(part in text for part in ("JiT-XS/2", "muon", "stream"))
