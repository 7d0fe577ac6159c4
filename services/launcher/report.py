"""The report of a run: a Markdown page and curves, made from the files in the run folder alone.

The module reads `metrics.jsonl`, `evaluations.jsonl`, `accounting.json`, `starts.jsonl` and `mesh.yaml`. It writes
`report.md` and `report.png`. A run that ended before its first step has a report too, which says how the run ended.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rollmesh.errors import ConfigError
from rollmesh.telemetry.json_lines import JsonLines
from services.launcher.outcome import ACCOUNTING, equation, read_json
from services.launcher.run_folder import read_resumes, read_settings

Record = dict[str, Any]

FILES = {
    "requested.yaml": "configuration as it was asked for",
    "mesh.yaml": "resolved configuration",
    "starts.jsonl": "one line a start",
    "metrics.jsonl": "one line a step",
    "evaluations.jsonl": "one line an evaluation",
    "accounting.json": "how the run and its groups ended",
    "logs": "one file a process",
    "batches": "recorded batches, for `rollmesh replay`",
    "checkpoints": "to go on from",
    "export": "Hugging Face model",
}
"""The files and folders that a run may leave in its run folder, with the meaning of each."""


def write_report(folder: Path) -> Path:
    """Write the report of a run. Return the path of the Markdown page.

    Raises:
        ConfigError: the folder holds no run, or the run has neither ended nor made a step.
        OSError: the report cannot be written.
    """
    steps = JsonLines(folder / "metrics.jsonl").read()
    accounting = read_json(folder / ACCOUNTING)
    if not (folder / "mesh.yaml").exists() or not (steps or accounting):
        problem = f"holds no mesh.yaml, or neither {ACCOUNTING} nor a metrics.jsonl with a step in it"
        raise ConfigError(str(folder), problem, "name the folder of a run")
    evaluations = JsonLines(folder / "evaluations.jsonl").read()
    config = read_settings(folder)
    picture = folder / "report.png"
    try:
        if steps:
            _draw(picture, steps, evaluations, config)
    except OSError:  # a full disk may still have room for the page
        picture.unlink(missing_ok=True)
    path = folder / "report.md"
    path.write_text(_page(folder, config, steps, evaluations, accounting), encoding="utf-8")
    return path


def staleness_histogram(steps: list[Record]) -> dict[int, int]:
    """Return the number of trained samples of the whole run for each staleness."""
    total: Counter[int] = Counter()
    for step in steps:
        for staleness, count in step.get("staleness_histogram", {}).items():
            total[int(staleness)] += int(count)
    return dict(sorted(total.items()))


def _page(folder: Path, config: Record, steps: list[Record], evaluations: list[Record], accounting: Record) -> str:
    lines = [f"# Run {config['run']['name']}", ""]
    if (folder / "report.png").exists():
        lines += ["![Curves of the run](report.png)", ""]
    lines += ["| | |", "|---|---|", *_end_rows(accounting), *_resume_rows(read_resumes(folder))]
    lines += [f"| started again | {r['time']} {_cell(r['reason'])} |" for r in accounting.get("restarts", [])]
    if steps:
        lines += [*_result_rows(config, steps, evaluations), "", *_staleness_section(steps), *_time_section(steps)]
    else:
        lines += [f"| optimiser batches | 0 of {config['training']['steps']} |", ""]
    lines += [*_evaluation_section(evaluations), *_accounting_section(accounting), _file_section(folder), ""]
    return "\n".join(lines)


def _end_rows(accounting: Record) -> list[str]:
    """Return the rows that say how the run ended.

    The launcher wrote the end to the accounting; a coordinator that ran without a launcher wrote fewer keys.
    """
    if "state" not in accounting:
        return []
    rows = [f"| the run | {accounting['state']} |"]
    if accounting.get("reason"):
        rows.append(f"| reason | {_cell(accounting['reason'])} |")
    if cause := accounting.get("first_cause"):
        rows.append(f"| failed first | {cause['process']}, log `{cause['log']}` |")
    if "checkpoint" in accounting:
        checkpoint = accounting["checkpoint"]
        rows.append(f"| last checkpoint | {f'`{checkpoint}`' if checkpoint else 'none was written'} |")
    return rows


def _resume_rows(resumes: list[Record]) -> list[str]:
    """Return a row for each resume: its time, the step before it, and the changes of the configuration."""
    sentences = ["; ".join([f"{r['time']} after step {r['after_step']}", *r["changes"]]) for r in resumes]
    return [f"| resumed | {_cell(sentence)} |" for sentence in sentences]


def _cell(text: str) -> str:
    """Return ``text`` in the form that fits into one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def _file_section(folder: Path) -> str:
    """Return a line that names the files and folders of the run that exist."""
    named = [f"`{name}` ({meaning})" for name, meaning in FILES.items() if (folder / name).exists()]
    return f"Files: {', '.join(named)}."


def _result_rows(config: Record, steps: list[Record], evaluations: list[Record]) -> list[str]:
    last = steps[-1]
    rows = [f"| optimiser batches | {last['step']} of {config['training']['steps']} |"]
    if evaluations:
        first, final = evaluations[0], evaluations[-1]
        change = f"{first['pass_at_1']:.3f} → {final['pass_at_1']:.3f} ± {final['pass_at_1_stderr']:.3f}"
        rows.append(f"| held-out pass@1 | {change} ({final['num_prompts']} prompts) |")
    rows += [
        f"| training reward | {steps[0]['reward/mean']:.3f} → {last['reward/mean']:.3f} |",
        f"| response length | {steps[0]['response/length_mean']:.1f} → {last['response/length_mean']:.1f} tokens |",
        f"| generated tokens | {sum(s.get('tokens/generated', 0) for s in steps):,.0f} |",
        f"| wall clock of all steps | {sum(s['time/step_s'] for s in steps):.0f} s |",
        f"| max_staleness | {config['training']['max_staleness']} |",
    ]
    return rows


def _staleness_section(steps: list[Record]) -> list[str]:
    histogram = staleness_histogram(steps)
    if not histogram:
        return []
    total = sum(histogram.values())
    rows = [f"| {staleness} | {count:,} | {count / total:.1%} |" for staleness, count in histogram.items()]
    return ["## Staleness of trained samples", "", "| versions behind | samples | share |", "|---|---|---|", *rows, ""]


def _time_section(steps: list[Record]) -> list[str]:
    """Return a table of the learner's time: the seconds of each kind of work, and the share of all steps."""
    names = {
        "time/wait_s": "waiting for a batch",
        "time/intake_s": "reading it",
        "time/forward_backward_s": "forward, backward, step",
        "time/publish_s": "publishing weights",
    }
    total = sum(step["time/step_s"] for step in steps)
    if total <= 0:
        return []
    rows = []
    for key, label in names.items():
        spent = sum(step.get(key, 0.0) for step in steps)
        rows.append(f"| {label} | {spent:.1f} s | {spent / total:.0%} |")
    return ["## The learner's time", "", "| | | of all |", "|---|---|---|", *rows, ""]


def _evaluation_section(evaluations: list[Record]) -> list[str]:
    if not evaluations:
        return []
    rows = [
        f"| {e['version']} | {e['pass_at_1']:.3f} | {e['pass_at_1_stderr']:.3f} | {e['mean_generated_tokens']:.1f} | "
        f"{e['num_failed']} |"
        for e in evaluations
    ]
    header = "| version | pass@1 | standard error | tokens | failed prompts |"
    return ["## Evaluations", "", header, "|---|---|---|---|---|", *rows, ""]


def _accounting_section(accounting: Record) -> list[str]:
    if not accounting:
        return []
    sentence = equation(accounting)
    lines = ["## Accounting", "", f"{sentence[0].upper()}{sentence[1:]}.", ""]
    if accounting.get("shortfall"):
        lines += [f"Warning: {accounting['shortfall']}.", ""]
    if accounting.get("reasons"):
        lines += ["| groups | ended because |", "|---|---|"]
        lines += [f"| {count} | {reason} |" for reason, count in accounting["reasons"].items()]
        lines.append("")
    return lines


def _draw(path: Path, steps: list[Record], evaluations: list[Record], config: Record) -> None:
    """Draw the four curves. Without matplotlib nothing is drawn."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(f"{config['run']['name']} · max_staleness {config['training']['max_staleness']}")
    numbers = [step["step"] for step in steps]

    reward = axes[0][0]
    reward.plot(numbers, [s["reward/mean"] for s in steps], color="#8aa6c1", label="training reward (sampled)")
    if evaluations:
        reward.errorbar(
            [e["step"] for e in evaluations],
            [e["pass_at_1"] for e in evaluations],
            yerr=[e["pass_at_1_stderr"] for e in evaluations],
            color="#c0392b",
            marker="o",
            capsize=2,
            label="held-out pass@1",
        )
    reward.set(title="Does it learn?", xlabel="step", ylabel="score", ylim=(0, 1))
    reward.legend(loc="lower right")

    length = axes[0][1]
    length.plot(numbers, [s["response/length_mean"] for s in steps], color="#2c7a51")
    length.set(title="Response length", xlabel="step", ylabel="generated tokens")
    length.set_ylim(bottom=0)

    staleness = axes[1][0]
    histogram = staleness_histogram(steps)
    staleness.bar([str(k) for k in histogram], list(histogram.values()), color="#7d5ba6")
    staleness.set(title="Staleness of trained samples", xlabel="versions behind", ylabel="samples")

    seconds = axes[1][1]
    parts = {"waiting": "time/wait_s", "training": "time/forward_backward_s", "publishing": "time/publish_s"}
    series = [[s.get(key, 0.0) for s in steps] for key in parts.values()]
    seconds.stackplot(numbers, series, labels=list(parts), colors=["#d5d8dc", "#2e86c1", "#e59866"])
    seconds.set(title="The learner's seconds per step", xlabel="step", ylabel="s")
    seconds.legend(loc="upper right")

    figure.savefig(path, dpi=110)
    plt.close(figure)
