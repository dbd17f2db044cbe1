"""The page at the end of a run, from a small metrics.jsonl."""

import json

import pytest

from mbrl_lm import report

FIGURES = {"user_nll/val": 1.25, "true/success": 0.5, "true/success_low": 0.4375, "true/success_high": 0.5625, "wall_s": 9.0}


@pytest.fixture
def workdir(tmp_path):
    """A run directory whose network was evaluated twice."""
    path = tmp_path / "my_run"
    path.mkdir()
    lines = [
        {"step": 2, "loss/user": 3.0},
        {"step": 5, "user_nll/val": None, "true/success": 0.25},
        {"step": 7, "user_nll/val": 2.5},
        {"step": 9, "user_nll/val": 1.25, "true/success": 0.5},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_headline_compares_the_last_figures_with_the_first(workdir):
    assert report.headline(workdir, FIGURES).splitlines() == [
        "held-out user, nats per token: 1.250 (at update 7: 2.500)",
        "success with the true user: 0.500 (at update 5: 0.250), 95 % interval [0.438, 0.562]",
    ]


def test_a_figure_that_was_never_a_number_is_told_all_the_same(workdir):
    assert report.headline(workdir, {"word_ppl/val": float("nan")}) == "held-out perplexity per word, both speakers: nan"


def test_the_page_holds_the_headline_the_curves_every_figure_and_dialogues(workdir):
    page = report.write_report(workdir, FIGURES, "<bos> hello\n").read_text().splitlines()
    assert page[0] == "# my_run"
    assert "- held-out user, nats per token: 1.250 (at update 7: 2.500)" in page
    assert [line for line in page if line.startswith("| ")] == [
        "| figure | value |", "| true/success | 0.5 |", "| true/success_high | 0.5625 |", "| true/success_low | 0.4375 |",
        "| user_nll/val | 1.25 |", "| wall_s | 9 |",
    ]  # fmt: skip
    assert "![learning curves](curves.png)" in page and "<bos> hello" in page
    drawn = (workdir / "curves.png").read_bytes()
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 5000


def test_no_curve_is_drawn_through_one_point(workdir):
    (workdir / "metrics.jsonl").write_text('{"step": 2, "user_nll/val": 3.0}\n{"step": 3, "user_nll/val": null}\n')
    page = report.write_report(workdir, FIGURES | {"true/success": 0.5}, "").read_text()
    assert "curves.png" not in page and not (workdir / "curves.png").exists()
    assert "held-out user, nats per token: 1.250 (at update 2: 3.000)" in page
