"""What a run may do with a folder that holds something: nothing, start over, or go on."""

import pytest

from blspkd.training.config_file import load_config
from blspkd.training.folder import last_checkpoint
from blspkd.training.run import train


def _run(path, *overrides, **options):
    return train(load_config(path, overrides), say=lambda _: None, **options)


def test_a_folder_with_something_in_it_is_left_alone(recipe):
    _run(recipe, "answer_limit=0", "optim.max_steps=1")
    with pytest.raises(ValueError, match="is not empty: go on with --resume"):
        _run(recipe)
    again = _run(recipe, "answer_limit=0", "optim.max_steps=1", force=True)
    assert (again.folder / "model.safetensors").exists()


def test_force_gives_up_a_run_only_for_one_that_can_begin(recipe):
    few = ("answer_limit=0", "optim.max_steps=1")
    folder = _run(recipe, *few).folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for wrong in (
        "data.train=/nowhere.jsonl",
        "losses.layer_kl={weight: 1}",
        "losses.alignment=1",
        "trainer.optim=sgd",
        "model.start_from=/nowhere",
    ):
        with pytest.raises(ValueError, match=r"nowhere|layer 3|cache_features|AdamW"):
            _run(recipe, *few, wrong, "losses.layer=3", force=True)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "leftover").mkdir()
    _run(recipe, *few, force=True)
    assert not (folder / "leftover").exists()


def test_force_never_empties_a_folder_that_is_no_run(recipe, tmp_path):
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="no run's folder"):
        _run(recipe, f"output={other}", force=True)
    assert (other / "thesis.tex").exists()


def test_a_start_that_failed_leaves_a_folder_that_can_be_started_in(recipe, tmp_path):
    folder = tmp_path / "failed"
    (folder / "data").mkdir(parents=True)  # the clips that come inside the package
    result = _run(recipe, "answer_limit=0", "optim.max_steps=1", f"output={folder}")
    assert (result.folder / "model.safetensors").exists()


def test_the_last_checkpoint_is_the_one_with_the_highest_number(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-20-old", "checkpoint-30"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-30":  # which was not finished
            (tmp_path / name / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_nothing_to_resume(recipe):
    with pytest.raises(ValueError, match="nothing to resume"):
        _run(recipe, resume=True)
