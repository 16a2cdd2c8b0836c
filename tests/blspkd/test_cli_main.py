"""The command line: exit codes, errors of one line, and help that needs no torch."""

import json
import subprocess
import sys
import types

import click
import numpy as np
import pytest
import soundfile

import blspkd.__main__ as cli


@pytest.fixture
def verb(monkeypatch):
    """Install a verb `prepare` that does what the test says."""

    def install(action):
        @click.command("prepare")
        @click.pass_context
        def command(ctx):
            action(ctx)

        module = types.SimpleNamespace(command=command)
        monkeypatch.setattr(cli, "import_module", lambda name: module)

    return install


def raising(error):
    def action(ctx):
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        (lambda ctx: None, 0, ""),
        (lambda ctx: {"kept": 3}, 0, ""),
        (lambda ctx: ctx.exit(3), 3, ""),
        (raising(ValueError("bad: expected 1, got 2")), 1, "Error: bad: expected 1, got 2\n"),
        (raising(RuntimeError("no memory")), 1, "Error: no memory\n"),
        (raising(FileNotFoundError(2, "No such file", "x.json")), 1, "Error: x.json: No such file"),
        (raising(KeyError("loss")), 1, "Error: KeyError: 'loss' (unexpected; `blspkd --debug"),
        (raising(KeyboardInterrupt()), 130, "Interrupted."),
        (raising(click.UsageError("no such thing")), 2, "Error: no such thing"),
    ],
)
def test_exit_codes(verb, capsys, action, code, message):
    verb(action)
    assert cli.main(["prepare"]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_traceback_comes_only_with_debug(verb, capsys):
    verb(raising(ValueError("bad")))
    assert cli.main(["--debug", "prepare"]) == 1
    captured = capsys.readouterr().err
    assert "Traceback" in captured
    assert captured.endswith("Error: bad\n")


@pytest.mark.parametrize("args", [["no-such-verb"], ["--no-such-option"], ["prepare"]])
def test_wrong_usage_is_2(capsys, args):
    assert cli.main(args) == 2
    assert "Usage: blspkd" in capsys.readouterr().err


def python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("args", [["--help"], ["prepare", "--help"]])
def test_help_imports_no_torch(args):
    out = python(
        "import sys; from blspkd.__main__ import main\n"
        f"assert main({args!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    assert "Usage: blspkd" in out


def test_help_lists_every_verb_and_python_m_works():
    result = subprocess.run(
        [sys.executable, "-m", "blspkd", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    for name, summary in cli.VERBS.items():
        assert name in result.stdout
        assert summary[:30] in result.stdout


@pytest.fixture
def corpus(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.3, 0.3, 16_000), 16_000)
    rows = [{"audio": "a.wav", "text": "hello"}, {"audio": "b.wav", "text": "hello"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_prepare_keeps_results_and_logs_apart(corpus, capsys):
    out = str(corpus / "out.jsonl")
    assert cli.main(["prepare", str(corpus / "in.jsonl"), out, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "out": out,
        "total": 2,
        "kept": 1,
        "hours": 0.0003,
        "dropped": {"missing": 1},
    }
    assert "kept 1 of 2 clips" in captured.err
    assert "dropped 1: missing, as in" in captured.err
    assert cli.main(["prepare", str(corpus / "in.jsonl"), out]) == 1
    assert "--force replaces it" in capsys.readouterr().err
    assert cli.main(["prepare", str(corpus / "in.jsonl"), out, "--force"]) == 0
    assert capsys.readouterr().out == ""


def test_prepare_fails_when_nothing_is_left(corpus, capsys):
    (corpus / "a.wav").unlink()
    out = corpus / "out.jsonl"
    assert cli.main(["prepare", str(corpus / "in.jsonl"), str(out), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kept"] == 0
    assert "Error: " in captured.err
    assert "none of 2 clips can be used" in captured.err
    assert not out.exists()


def test_prepare_reports_a_missing_source_and_bad_options(corpus, capsys):
    assert cli.main(["prepare", str(corpus / "none"), str(corpus / "out.jsonl")]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    args = ["prepare", str(corpus / "in.jsonl"), str(corpus / "out.jsonl")]
    assert cli.main([*args, "--max-duration", "60"]) == 1
    assert "max_duration=60" in capsys.readouterr().err
