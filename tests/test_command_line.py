"""The command line: what is given is set, nothing else, and every mistake is told with what would be right."""

import json
import sys

import pytest
from absl.testing import flagsaver

from mbrl_lm import command_line
from mbrl_lm.config import Config, ConfigError
from mbrl_lm.presets import preset


def test_only_what_is_given_is_set(monkeypatch):
    args = ["--config.model.width=48", "--config.returns.lambda_=0.5", "--config.model.tied", "--config.data_dir=a b"]
    args += ["--config.widths=(34, 68)"]
    monkeypatch.setattr(sys, "argv", ["program", *args, "--workdir=w"])
    with flagsaver.flagsaver():
        given = command_line.flatten(command_line.parse(sys.argv))
        assert command_line.WORKDIR.value == "w"
    monkeypatch.setattr(sys, "argv", ["program"])
    with flagsaver.flagsaver():
        default = command_line.flatten(command_line.parse(sys.argv))
    changed = {name: value for name, value in given.items() if value != default[name]}
    assert changed == {"model.width": 48, "returns.lambda_": 0.5, "model.tied": True, "data_dir": "a b", "widths": (34, 68)}


def test_a_program_that_looks_at_a_run_takes_its_config(monkeypatch, tmp_path):
    def parse(*args):
        monkeypatch.setattr(sys, "argv", ["program", f"--workdir={tmp_path}", *args])
        with flagsaver.flagsaver():
            return command_line.parse(sys.argv, of_run=True)

    with pytest.raises(ConfigError, match="holds no run"):
        parse()
    cfg = preset("concierge", "tiny")
    (tmp_path / "config.json").write_text(json.dumps({"variant": "tiny", **command_line.flatten(cfg)}))
    assert parse() == cfg
    judged = parse("--config.eval.final_dialogues=7", "--config.mesh.fsdp=2")
    assert (judged.eval.final_dialogues, judged.mesh.fsdp, judged.tokens) == (7, 2, cfg.tokens)
    with pytest.raises(ConfigError, match="loss.kl is fixed by the run"):
        parse("--config.loss.kl=1")
    (tmp_path / "config.json").write_text('{"variant": "tiny", "loss.unheard_of": 1}')
    with pytest.raises(ConfigError, match="another version"):
        parse()


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--config.model.wdth=3", "there is no field --config.model.wdth; the nearest one is --config.model.width"),
        ("--config.modle.width", "the nearest one is --config.model.width"),
        ("--noconfig.model.tide", "the nearest one is --config.model.tied"),
        ("--config.model=3", "--config.model is a group of fields: set one of them, as in --config.model.layers=..."),
        ("--config=x.py", "--config takes no value"),
    ],
)
def test_unknown_fields_are_told_with_the_nearest(arg, message):
    with pytest.raises(ConfigError) as caught:
        command_line._check_fields(["program", "--config.seed=1", arg])
    assert message in str(caught.value)
    command_line._check_fields(["program", "--config.returns.lambda_=0.9", "--config.model.tied", "--", arg])


def test_what_a_resumed_run_may_change_are_fields():
    assert set(command_line.MAY_CHANGE) <= set(command_line.flatten(Config()))


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--config.model.width=abc", "--config.model.width=abc has the wrong type: it takes int, as in 128"),
        ("--config.model.tied=perhaps", "it takes bool, as in False"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ("--config.data=nowhere", "nowhere"),
        ("--variant=nothing", "nothing"),
        ("surplus", "'surplus' is not a flag"),
    ],
)
def test_a_wrong_command_line_is_told(arg, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", arg])
    with flagsaver.flagsaver(), pytest.raises(ConfigError) as caught:
        command_line.parse(sys.argv)
    assert message in str(caught.value)


def test_help_names_the_flags_and_the_fields(capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.parse(["program", "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "--workdir" in out and "--config.model.width=128" in out
