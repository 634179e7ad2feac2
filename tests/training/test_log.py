"""The log of a run: what is written is read, cut off or not."""

from __future__ import annotations

from pathlib import Path

from xmc.training.log import RunLog, read_log


def test_a_line_that_a_crash_cut_off_is_no_event(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = RunLog(path)
    log.write("step", loss=0.5)
    kept = log.sync()
    log.write("end", best=1)
    log.close()
    whole = path.read_bytes()
    assert [event["event"] for event in read_log(path)] == ["step", "end"]
    for size in range(kept, len(whole)):
        path.write_bytes(whole[:size])
        assert read_log(path) == [{"event": "step", "loss": 0.5}]
    RunLog(path, kept).close()  # what a resumed run does
    assert path.read_bytes() == whole[:kept]


def test_any_character_stays_within_its_line(tmp_path: Path) -> None:
    """Some end a line in Python, and none does in JSON but the one that is escaped."""
    text = "a\u2028b\u0085c\x0bd\ne"
    log = RunLog(tmp_path / "log.jsonl")
    log.write("label", name=text)
    log.close()
    assert read_log(tmp_path / "log.jsonl") == [{"event": "label", "name": text}]
