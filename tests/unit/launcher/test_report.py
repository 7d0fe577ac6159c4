"""A report is made from the run folder alone and says what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rollmesh.errors import ConfigError
from rollmesh.replay.accounting import EndState
from services.launcher.outcome import Outcome, read_json, record
from services.launcher.report import staleness_histogram, write_report


def _step(number: int) -> dict[str, object]:
    return {
        "step": number,
        "version": f"0.{number}",
        "reward/mean": 0.2 + 0.1 * number,
        "response/length_mean": 16.0 + number,
        "tokens/generated": 100,
        "time/step_s": 2.0,
        "time/wait_s": 1.0,
        "time/forward_backward_s": 0.5,
        "time/publish_s": 0.1,
        "time/since_start_s": 2.0 * number,
        "staleness_histogram": {"0": 3, "1": 5},
    }


def _evaluation(version: int, score: float) -> dict[str, object]:
    return {
        "version": f"0.{version}",
        "step": version,
        "num_prompts": 512,
        "num_failed": 0,
        "pass_at_1": score,
        "pass_at_1_stderr": 0.013,
        "mean_generated_tokens": 20.0,
        "truncation_rate": 0.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mesh.yaml").write_text("run: {name: tiny}\ntraining: {steps: 4, max_staleness: 1}\n")
    lines = [json.dumps(_step(number)) for number in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluations = [json.dumps(_evaluation(0, 0.2)), json.dumps(_evaluation(4, 0.9))]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(evaluations) + "\n")
    counts = dict.fromkeys(("pending", "leased", "ready", "batched", "filtered"), 0)
    counts |= {"trained": 2, "retired": 14, "failed": 1}
    (tmp_path / "accounting.json").write_text(
        json.dumps({"num_groups": counts, "num_opened": 17, "reasons": {"reward timed out": 1}})
    )
    return tmp_path


def test_the_page_tells_the_score_the_staleness_and_the_accounting(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "| held-out pass@1 | 0.200 → 0.900 ± 0.013 (512 prompts) |" in page
    assert "| 1 | 20 | 62.5% |" in page
    assert "17 groups opened = 16 trained + 0 filtered + 1 failed + 0 still open." in page
    assert "| 1 | reward timed out |" in page
    assert "| waiting for a batch | 4.0 s | 50% |" in page


def test_the_page_says_why_a_run_ended_early(folder: Path) -> None:
    books = json.loads((folder / "accounting.json").read_text())
    (folder / "accounting.json").write_text(json.dumps({**books, "shortfall": "the prompts were used up"}))
    assert "\nWarning: the prompts were used up.\n" in write_report(folder).read_text()


def test_the_picture_is_a_png(folder: Path) -> None:
    write_report(folder)
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_half_a_line_of_a_killed_run_is_ignored(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as sink:
        sink.write('{"step": 5, "rew')
    assert "| optimiser batches | 4 of 4 |" in write_report(folder).read_text()


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no mesh\.yaml"):
        write_report(tmp_path)


def test_histograms_of_steps_add_up() -> None:
    assert staleness_histogram([_step(1), _step(2)]) == {0: 6, 1: 10}


def _fail(folder: Path) -> None:
    books = read_json(folder / "accounting.json")
    log = folder / "logs" / "rollout-0.log"
    record(folder, Outcome(EndState.FAILED, 1, "rollout-0 was killed | by SIGKILL", "rollout-0", log), books)


def test_the_page_of_a_failed_run_says_so_and_why_and_where_to_go_on(folder: Path) -> None:
    for name in ("step-000002", "step-000010", "step-000012.partial"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "manifest.json").write_text("{}")
    _fail(folder)
    page = write_report(folder).read_text()
    assert page.count("| | |\n") == 1  # the demo shows the first table
    assert "| the run | failed |" in page
    assert "| reason | rollout-0 was killed \\| by SIGKILL |" in page
    assert "| failed first | rollout-0, log `logs/rollout-0.log` |" in page
    assert "| last checkpoint | `checkpoints/step-000010` |" in page
    assert "17 groups opened = 16 trained" in page


def test_a_run_that_failed_before_its_first_step_has_a_page(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    (folder / "evaluations.jsonl").unlink()
    (folder / "accounting.json").write_text(json.dumps({"missing": "Redis is gone"}))
    _fail(folder)
    page = write_report(folder).read_text()
    assert "| last checkpoint | none was written |" in page
    assert "There is no accounting: Redis is gone." in page


def test_the_page_lists_no_file_that_does_not_exist(folder: Path) -> None:
    (folder / "evaluations.jsonl").unlink()
    files = write_report(folder).read_text().splitlines()[-1]
    assert "`metrics.jsonl`" in files
    assert "export" not in files
    assert "evaluations" not in files


def test_an_accounting_that_was_cut_off_counts_as_none(folder: Path) -> None:
    (folder / "accounting.json").write_text("")
    assert "## Accounting" not in write_report(folder).read_text()


def test_the_books_of_a_coordinator_without_a_launcher_say_how_the_run_ended(folder: Path) -> None:
    books = read_json(folder / "accounting.json")
    (folder / "accounting.json").write_text(json.dumps({**books, "state": "failed", "reason": "learner: no memory"}))
    page = write_report(folder).read_text()
    assert "| the run | failed |" in page
    assert "| reason | learner: no memory |" in page
