"""What has to be true of a run folder after a run that was hit: versions, accounting and batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rollmesh.replay.recording import load_recorded
from rollmesh.types import Group, PolicyVersion
from services.launcher.chaos_processes import find_processes
from tests.integration.mesh_runs import MeshRun, processes_of


def recorded_batches(run: MeshRun) -> list[list[Group]]:
    """Return the groups of each step of the lineage that survived. A step that was trained again has one batch."""
    return [load_recorded(path)[1] for path in sorted((run.folder / "batches").glob("step-*.msgpack"))]


def check_run(run: MeshRun, num_steps: int, groups_per_step: int) -> None:
    """Fail if the run lost or repeated something, went back to an earlier version, or left a process behind."""
    assert run.exit_code == 0, run.output
    check_versions([PolicyVersion.parse(line["version"]) for line in run.lines("metrics.jsonl")])
    assert [line["step"] for line in run.lines("metrics.jsonl")] == list(range(1, num_steps + 1))
    check_versions([PolicyVersion.parse(line["version"]) for line in run.lines("evaluations.jsonl")])
    books = run.accounting
    assert books["state"] == "completed"
    assert books["is_balanced"], books
    assert books["num_groups"]["failed"] == 0, books
    assert books["num_trained"] == num_steps * groups_per_step, books
    check_batches(recorded_batches(run), num_steps, groups_per_step)
    assert find_processes(run.folder) == {}
    assert processes_of(run.folder) == []


def check_versions(versions: Sequence[PolicyVersion]) -> None:
    """Fail unless the numbers grow from line to line, and the lineage never becomes older."""
    for earlier, later in itertools.pairwise(versions):
        assert earlier.number < later.number, (earlier, later)
        assert earlier.lineage <= later.lineage, (earlier, later)


def check_batches(batches: Sequence[Sequence[Group]], num_steps: int, groups_per_step: int) -> None:
    """Fail unless every step has a whole batch, no prompt is in two of them, and no token came from a later version."""
    assert [len(groups) for groups in batches] == [groups_per_step] * num_steps
    prompts = [group.group_id for groups in batches for group in groups]
    assert len(set(prompts)) == len(prompts), f"trained twice: {sorted(p for p in prompts if prompts.count(p) > 1)}"
    for group in itertools.chain(*batches):
        for sample in group.samples:
            numbers = [span.version.number for span in sample.version_spans]
            assert numbers == sorted(numbers), (sample.sample_id, numbers)
