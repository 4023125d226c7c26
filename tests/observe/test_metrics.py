"""Files with a line per update: cut back where a resumed run writes again."""

import json

from train.observe import metrics


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps)


def test_metrics_are_cut_at_the_resumed_step_and_kept_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2, 3, 4, 5) + '{"step": 6, "lo')
    assert metrics.cut(path, 3) == 3
    assert path.read_text() == lines(1, 2, 3)
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == lines(4, 5) + '{"step": 6, "lo\n'
    assert metrics.cut(path, 3) == 0
    path.write_text(lines(1, 2, 3, 4))
    metrics.cut(path, 0)
    assert path.read_text() == ""
    assert (tmp_path / "metrics.discarded.jsonl").read_text().endswith(lines(1, 2, 3, 4))
    assert metrics.cut(tmp_path / "absent.jsonl", 3) == 0


def test_a_line_torn_before_the_resumed_step_loses_nothing_after_it_silently(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1) + "\0\0\0\n" + lines(3))
    assert metrics.cut(path, 3) == 2
    assert path.read_text() == lines(1)


def test_trace_is_cut_by_plan_step(tmp_path):
    path = tmp_path / "trace.txt"
    path.write_text("0 64x64 aa 0 1\n1 64x64 aa 0 1\n2 64x64 aa 0 1\n3 64")
    assert metrics.cut_trace(path, 2) == 2
    assert path.read_text() == "0 64x64 aa 0 1\n1 64x64 aa 0 1\n"
