"""recipes/smollm2-whisper-base/matrix.py: rows, seeds, and going on where it stopped."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from benchmarks import proof
from click.testing import CliRunner

from blspkd.data.manifest import read_manifest, write_manifest

RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2-whisper-base"


@pytest.fixture(scope="module")
def matrix():
    """The recipe as it is imported when run as a script: its folder is on the path."""
    sys.path.insert(0, str(RECIPE))
    before = set(sys.modules)
    import matrix

    yield matrix
    sys.path.remove(str(RECIPE))
    for name in set(sys.modules) - before:
        if name.startswith("matrix"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def plan_file(tiny_model_section, tiny_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    records = read_manifest(tiny_corpus.manifest)
    write_manifest(folder / "train.jsonl", records[:4])
    write_manifest(folder / "test.jsonl", records[3:])
    base = {
        "model": tiny_model_section,
        "data": {
            "train": str(folder / "train.jsonl"),
            "eval": {"unseen": str(folder / "test.jsonl")},
        },
        "save_steps": 1,
        "log_steps": 1,
        "optim": {"max_steps": 3, "batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2},
    }
    records = read_manifest(tiny_corpus.manifest)
    write_manifest(folder / "test.jsonl", records[4:])
    write_manifest(folder / "more.jsonl", [records[0], *records[4:]])
    plan = {
        "title": "A try",
        "about": "tiny parts",
        "base": "base.yaml",
        "runs": str(folder / "runs"),
        "results": "results",
        "common": {"losses.temperature": 2.0, "model.plora": None},
        "rows": {
            "conv": {
                "title": "CNN",
                "set": {"model.adapter_type": "conv", "model.adapter": {}, "losses.input_kl": 0},
            },
            "plain": {
                "seeds": [3],
                "set": {"model.plora": {"r": 4, "lora_alpha": 400}, "model.plain_lora": True},
            },
            "base": {
                "base": "base.yaml",
                "robustness": True,
                "tasks": True,
                "more_clips": True,
                "seeds": [0, 1],
            },
        },
        "evaluate": {
            "max_new_tokens": 4,
            "extra_tasks": {"asr": "unseen", "qa": str(folder / "test.jsonl")},
            "robustness": {"set": "unseen", "conditions": ["noise:0"], "no_speech": 1},
            "more_clips": {"unseen": str(folder / "more.jsonl")},
        },
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder / "plan.yaml"


@pytest.fixture
def command(matrix, plan_file):
    def run(*options):
        result = CliRunner().invoke(matrix.main, ["--plan", str(plan_file), *options])
        return result.exit_code, result.output

    return run


def result(plan_file, name):
    return json.loads((plan_file.parent / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("folder", [RECIPE, RECIPE.parent / "tiny"], ids=lambda path: path.name)
def test_the_shipped_matrices_are_sound(matrix, folder):
    plan = matrix.read_plan(folder / "matrix.yaml")
    configs = {name: matrix.row_config(plan, row, 0) for name, row in plan.rows.items()}
    if folder == RECIPE:
        assert len([row for row in plan.rows.values() if row.scaling]) >= 3
    assert all(len(plan.rows[name].seeds) == 3 for name in ("cnn-ce", "cnn-kl", "plora"))
    for name in plan.rows.keys() - {"recipe", "recipe-2000", "recipe-8000", "recipe-32000"}:
        # same data and as many clips: only what the row is about may differ
        theirs, ours = matrix.settings(configs[name]), matrix.settings(configs["cformer-rkl"])
        allowed = {"model", "losses", "data.cache_features", "optim.encoder_learning_rate"}
        different = matrix.differing(theirs, ours)
        assert all(any(f.startswith(one) for one in allowed) for f in different), different
    assert configs["cnn-ce"].losses.response_kl.weight == 0
    assert configs["cnn-ce"].model.plora is None
    assert configs["plain-lora"].model.plain_lora
    assert configs["plain-lora"].model.plora == configs["plora"].model.plora
    document = yaml.safe_load((folder / "matrix.yaml").read_text())
    for pair in [*document["claims"], *document["differences"]]:
        assert {pair["first"], pair["second"]} <= set(plan.rows)


def test_a_dry_run_names_every_run_and_writes_nothing(command, plan_file):
    code, output = command("--dry-run")
    assert code == 0, output
    assert [line.split()[0] for line in output.splitlines()] == ["conv", "plain", "base", "base"]
    assert output.count("to do") == 4
    assert not (plan_file.parent / "runs").exists()


def test_faults_are_told_before_anything_is_trained(command, plan_file, tmp_path):
    code, output = command("--only", "conf")
    assert (code, "no row 'conf'" in output) == (1, True)
    code, output = command("optim.learning_rat=1")
    assert (code, "did you mean 'learning_rate'" in output) == (1, True)
    document = yaml.safe_load(plan_file.read_text())
    document["rows"]["conv"]["sets"] = {}
    other = plan_file.parent / "other.yaml"
    other.write_text(yaml.safe_dump(document))
    code, output = command("--plan", str(other))
    assert (code, "unknown key 'sets'" in output) == (1, True)
    del document["rows"]["conv"]["sets"]
    document["evaluate"]["extra_tasks"] = {"qa": "nowhere.jsonl"}
    other.write_text(yaml.safe_dump(document))
    code, output = command("--plan", str(other))
    assert (code, "extra_tasks.qa: nowhere.jsonl is neither" in output) == (1, True)
    del document["evaluate"]["extra_tasks"]
    document["evaluate"]["more_clips"] = {"unseen": "nowhere.jsonl"}
    other.write_text(yaml.safe_dump(document))
    code, output = command("--plan", str(other))
    assert (code, "more_clips.unseen: unseen must be a set" in output) == (1, True)
    # a set may be taken out; then nothing can be asked of it, and no clips be more than its own
    code, output = command("data.eval.unseen=null")
    assert (code, "extra_tasks.asr: unseen is neither" in output) == (1, True)
    document["evaluate"]["more_clips"] = {"unseen": str(plan_file.parent / "more.jsonl")}
    other.write_text(yaml.safe_dump(document))
    code, output = command("--plan", str(other), "data.eval.unseen=null")
    assert (code, "more_clips.unseen: unseen must be a set" in output) == (1, True)
    assert not (plan_file.parent / "runs").exists()


def test_all_rows_are_trained_measured_and_then_passed_over(command, plan_file, matrix):
    code, output = command("--seed", "0", "--seed", "3")
    assert code == 0, output
    conv, plain, base = (result(plan_file, name) for name in ("conv-s0", "plain-s3", "base-s0"))
    assert (conv["row"], conv["title"]) == ("conv", "CNN")
    for one in (conv, plain, base):
        assert (one["clips_seen"], one["train_clips"], one["steps"]) == (6, 4, 3)
        assert one["commit"]
        assert one["train_seconds"] > 0
        assert one["earlier_stages"] == {}
        clips = one["sets"]["unseen"]
        assert clips["ids"] == ["clip4", "clip5"]
        assert len(clips["answers"]) == 2
        for name, pairs in clips["meters"].items():
            total, count = map(sum, zip(*pairs, strict=True))
            if count and name != "text_answers_changed":
                assert clips["figures"][name] == pytest.approx(total / count, rel=1e-3), name
        rouge = clips["speech"]["self_rouge_l"]
        mean = sum(part for part, _ in rouge) / len(rouge)
        assert clips["rows"]["speech"]["self_rouge_l"] == pytest.approx(mean, rel=1e-3)
        assert len(clips["cascade"]["self_bleu"][0]) == 10

    asked = base["tasks"]
    assert {task: one["set"] for task, one in asked.items()} == {"asr": "unseen", "qa": "test"}
    assert "wer" in asked["asr"]["rows"]["text"]
    assert len(asked["qa"]["ids"]) == len(asked["qa"]["speech"]["self_rouge_l"]) == 2
    # an adapter without one output per token has no transcripts, and no KL on the input
    assert conv["sets"]["unseen"]["transcripts"] is None
    assert "tasks" not in conv
    assert "input_kl" not in conv["sets"]["unseen"]["figures"]
    assert "transcript_wer" in base["sets"]["unseen"]["speech"]

    # text and cascade are made once; plain LoRA has its own, and says how far they went
    shared = json.loads((plan_file.parent / "results" / "text-and-cascade.json").read_text())
    assert set(shared["entries"]) == {
        "unseen, continue",
        "unseen, continue, clean",
        "unseen, asr",
        "unseen, asr, clean",
        "test, qa",
        "test, qa, clean",
        "unseen, continue, noise:0",
        # what Whisper hears, whatever is asked
        "unseen, clean",
        "test, clean",
        "more unseen, clean",
        "unseen, noise:0",
    }
    text = shared["entries"]["unseen, continue"]["answers"]
    drifted = plain["sets"]["unseen"]
    assert drifted["text_answers"] != text
    assert drifted["figures"]["text_drift_kl"] > 0
    assert set(drifted["against_untouched"]) == {"text", "cascade", "speech"}
    assert conv["sets"]["unseen"]["cascade"] == base["sets"]["unseen"]["cascade"]

    more = base["more_clips"]["unseen"]
    assert more["clips"] == 1  # the others are in the set
    assert set(more["wer"]) == {"speech", "cascade"}
    assert "token_accuracy" in more["figures"]
    assert "more_clips" not in conv

    assert "robustness" not in conv
    conditions = base["robustness"]["conditions"]
    assert list(conditions) == ["clean", "noise:0"]
    assert conditions["clean"]["speech"] == base["sets"]["unseen"]["speech"]
    assert base["robustness"]["no_speech"]["rows"]["speech"]["silence"]["clips"] == 1

    document = proof.text(plan_file.parent / "results", plan_file.parent / "r.md", plan_file)
    rouge = base["sets"]["unseen"]["rows"]["speech"]["self_rouge_l"]
    assert f"{rouge:.3f}" in document.split("| base | 1 |")[1].splitlines()[0]
    assert "base, seed 0, on 2 clips of *unseen*" in document
    assert "plain, seed 3" in document
    assert "| base | unseen (2 clips) | asr | WER % |" in document

    times = {path: path.stat().st_mtime_ns for path in plan_file.parent.rglob("*.json")}
    code, output = command("--seed", "0", "--seed", "3")
    assert code == 0, output
    assert output.count("done") == 3
    assert times == {path: path.stat().st_mtime_ns for path in plan_file.parent.rglob("*.json")}


def test_the_cascade_is_made_anew_without_the_runs(matrix, plan_file, tmp_path):
    """Needs the runs of the test before. By the same arithmetic it comes out as it was."""
    import matrix_cascade

    results = shutil.copytree(plan_file.parent / "results", tmp_path / "results")
    shared = json.loads((results / "text-and-cascade.json").read_text())
    before = {path.name: json.loads(path.read_text()) for path in results.glob("*-s*.json")}
    for path in results.glob("*-s*.json"):
        run = before[path.name]
        spoilt = json.loads(path.read_text())
        for one in (*spoilt["sets"].values(), *spoilt.get("tasks", {}).values()):
            one["cascade"] = one["rows"]["cascade"] = {"self_rouge_l": "of another day"}
        if "robustness" in run:
            for one in spoilt["robustness"]["conditions"].values():
                one["cascade"] = one["rows"]["cascade"] = "of another day"
            spoilt["robustness"]["no_speech"]["rows"]["cascade"] = "of another day"
            spoilt["more_clips"]["unseen"]["wer"]["cascade"] = "of another day"
        path.write_text(json.dumps(spoilt))
    options = ["--plan", str(plan_file), "--results", str(results)]
    options += ["--unfinished", str(tmp_path / "unfinished")]
    found = CliRunner().invoke(matrix_cascade.main, options)
    assert found.exit_code == 0, found.output
    for name, run in before.items():
        if run["row"] == "plain":
            for one in run["sets"].values():  # its own language model had answered
                for place in (one, one["rows"], one["against_untouched"]):
                    del place["cascade"]
        assert json.loads((results / name).read_text()) == run, name
    anew = json.loads((results / "text-and-cascade.json").read_text())
    kept = anew.pop("speech_compared_with")
    assert anew == shared
    assert kept["entries"]["unseen, continue"] == shared["entries"]["unseen, continue"]
    assert not any(
        "heard" in one or name.endswith("clean") for name, one in kept["entries"].items()
    )


def test_a_run_goes_on_from_what_is_there(command, plan_file, monkeypatch, matrix):
    """Needs the runs of the test before."""
    path = plan_file.parent / "results" / "conv-s0.json"
    whole = json.loads(path.read_text())
    path.unlink()
    monkeypatch.setattr(matrix, "train", None)  # trained: measuring is all that is left
    code, output = command("--only", "conv")
    assert code == 0, output
    again = json.loads(path.read_text())
    assert again["sets"] == whole["sets"]
    monkeypatch.undo()

    path.unlink()
    folder = plan_file.parent / "runs" / "conv-s0"
    (folder / "summary.json").unlink()
    for name in ("checkpoint-3", "model.safetensors"):
        target = folder / name
        if target.is_dir():
            for inner in target.iterdir():
                inner.unlink()
            target.rmdir()
        else:
            target.unlink()
    code, output = command("--only", "conv", "--dry-run")
    assert "begun" in output
    code, output = command("--only", "conv")
    assert code == 0, output
    assert json.loads(path.read_text())["sets"] == whole["sets"]  # as if nothing had happened


def test_results_of_other_settings_are_refused(command, plan_file):
    """Needs the runs of the test before."""
    code, output = command("--only", "conv", "--steps", "5")
    assert (code, "other settings (optim.max_steps)" in output) == (1, True)


def test_results_from_before_a_field_was_known_are_still_good(command, plan_file):
    """Needs the runs of the tests before."""
    path = plan_file.parent / "results" / "conv-s0.json"
    found = json.loads(path.read_text())
    del found["settings"]["model"]["plain_lora"], found["settings"]["losses"]["token"]
    path.write_text(json.dumps(found))
    code, output = command("--only", "conv")
    assert (code, "done" in output) == (0, True), output
