"""Steps, clips and seconds of a run and of those before it, by their logs."""

import json
from pathlib import Path

import yaml

from blspkd.training.effort import earlier_stages


def a_run(folder, lines, start_from=None):
    optim = {"batch_size": 4, "gradient_accumulation": 2}
    config = {"log_steps": 10, "optim": optim, "model": {"start_from": start_from}}
    folder.mkdir()
    (folder / "train.yaml").write_text(yaml.safe_dump({"processes": 2, "config": config}))
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder)


def test_the_effort_counts_earlier_stages_and_what_was_done_twice(tmp_path):
    def line(step, speed):
        return {"step": step, "loss": 1.0, "clips_per_second": speed}

    first = a_run(tmp_path / "first", [line(1, 8.0), line(10, 16.0), {"step": 10, "eval_x/kl": 1}])
    resumed = [line(1, 16.0), line(10, 16.0), line(20, 16.0), line(20, 32.0), line(30, 16.0)]
    second = a_run(tmp_path / "second", [*resumed, {"step": 34, "train_runtime": 9.0}], first)
    third = a_run(tmp_path / "third", [line(1, 16.0)], second)

    one = {"steps": 10, "clips_seen": 160, "train_seconds": 2 + 9}
    two = {"steps": 34, "clips_seen": 544, "train_seconds": 20 + 5 + 10 + 4}
    assert earlier_stages(Path(third)) == {first: one, second: two}
    released = a_run(tmp_path / "released", [line(1, 16.0)], str(tmp_path / "weights"))
    assert earlier_stages(Path(released)) == {}


def test_runs_that_overwrote_one_another_are_counted_once(tmp_path):
    line = {"step": 10, "loss": 1.0, "clips_per_second": 16.0}
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert a_run(tmp_path / "a", [line], b) == a
    assert a_run(tmp_path / "b", [line], a) == b
    assert list(earlier_stages(Path(a))) == [b]
    itself = a_run(tmp_path / "itself", [line], str(tmp_path / "itself"))
    assert earlier_stages(Path(itself)) == {}
