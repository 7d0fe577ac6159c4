"""The command line of RollMesh.

One command starts each service, `up` starts all services on this machine, and further commands inspect a run or a mesh
file. The configuration is parsed before any heavy library is imported. A fault of the user is one sentence on stderr,
with exit code 2. Services are named as strings and imported late, because the wheel does not hold them. When a command
fails, its last line on stderr begins with ``error: `` and says why.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rollmesh
from rollmesh.errors import EXIT_START_AGAIN, ConfigError, RollMeshError, StartAgainError
from rollmesh.telemetry import output
from rollmesh.telemetry.crash import report_crash

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2

SERVICES = {
    "coordinator": "lease work, bound staleness, version the policy",
    "rollout": "generate trajectories with vLLM",
    "reward": "score samples with a user's function",
    "reference": "give the frozen model's log-probabilities",
    "learner": "optimise the policy with DeepSpeed",
}

SCORERS = ("reward", "reference")
"""Services that a file without a mesh may describe."""
CHAOS_MOMENTS = ("leased", "generating", "scoring", "batched", "training", "transfer", "checkpoint")
"""The moments at which `rollmesh chaos` may strike."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit code of the process."""
    output.install()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's errors that matter come as statuses
    try:
        args = build_parser().parse_args(arguments)
        exit_code = int(args.run(args))
        sys.stdout.flush()
        return exit_code
    except ConfigError as error:
        problem, exit_code = str(error), EXIT_USAGE
    except StartAgainError as error:
        problem, exit_code = str(error), EXIT_START_AGAIN
    except RollMeshError as error:
        problem, exit_code = str(error), EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + 2
    except Exception as error:  # noqa: BLE001 - outermost frame: the log gets the traceback, stderr the sentence
        problem, exit_code = report_crash(error), EXIT_FAILED
    print(f"error: {problem}", file=sys.stderr, flush=True)
    return exit_code


class _Parser(argparse.ArgumentParser):
    """The parser of the arguments. A wrong argument ends like every fault of the user: one line, exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Layout, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"error: {self.prog}: {message}; see `{self.prog} --help`\n")


class _Layout(argparse.HelpFormatter):
    """The layout of the help text, with every command on one line: argparse measures names without their indent."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            self._action_max_length += self._indent_increment


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rollmesh",
        description="Reinforcement learning for language models as a mesh of gRPC services.",
        epilog="`rollmesh up mesh.yaml` runs everything on this machine; `rollmesh config schema` lists all settings.",
    )
    parser.add_argument("--version", action="version", version=f"rollmesh {rollmesh.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")

    up = commands.add_parser("up", help="run the whole mesh on this machine")
    _add_config(up, is_positional=True)
    earlier = up.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name")
    earlier.add_argument("--resume", action="store_true", help="go on with the earlier run of the same name")
    up.set_defaults(run=_run_up)

    resume_help = "go on with an earlier run, from its folder"
    description = "Go on with a run that was interrupted, that failed, or that is to be longer. See docs/recovery.md."
    resume = commands.add_parser("resume", help=resume_help, description=description)
    resume.add_argument("folder", type=_path, metavar="RUN", help="run folder, e.g. runs/NAME")
    _add_overrides(resume)
    resume.set_defaults(run=_run_resume)

    for service, summary in SERVICES.items():
        command = commands.add_parser(service, help=summary, description=f"One service: {summary}.")
        _add_config(command)
        command.add_argument("--name", help=f"member name (default: {_default_name(service)})")
        command.set_defaults(run=_run_service, service=service)

    status = commands.add_parser("status", help="show a running mesh at a glance")
    _add_config(status)
    status.add_argument("--json", action="store_true", dest="is_json", help="everything, as JSON")
    status.set_defaults(run=_run_status)

    why = commands.add_parser("why", help="say who waits for whom in a run, or why the run ended")
    why.add_argument("target", metavar="RUN", help="run folder, e.g. runs/NAME, or the coordinator's host:port")
    why.add_argument("--json", action="store_true", dest="is_json", help="the facts as JSON")
    why.set_defaults(run=_run_why)

    checkpoints = commands.add_parser("checkpoints", help="list a run's checkpoints: step, version, pass@1, size")
    checkpoints.add_argument("folder", type=_path, metavar="RUN", help="run folder, e.g. runs/NAME")
    checkpoints.add_argument("--json", action="store_true", dest="is_json", help="the list as JSON")
    checkpoints.set_defaults(run=_run_checkpoints)

    _add_chaos(commands)
    _add_replay(commands)

    report = commands.add_parser("report", help="write a run's report (again)")
    report.add_argument("folder", type=_path, help="run folder")
    report.set_defaults(run=_run_report)

    config_help = "check or show mesh files, list all settings"
    config = commands.add_parser("config", help=config_help, description="Work with mesh files.").add_subparsers(
        title="verbs", required=True, metavar="verb"
    )
    check = config.add_parser("check", help="check a mesh file and the files it names, without starting anything")
    _add_config(check, is_positional=True)
    check.set_defaults(run=_run_config_check)
    show = config.add_parser("show", help="print the mesh file with all defaults and overrides")
    _add_config(show, is_positional=True)
    show.set_defaults(run=_run_config_show)
    schema = config.add_parser("schema", help="print every key with its type, default and meaning, as JSON Schema")
    schema.set_defaults(run=_run_config_schema)
    return parser


def _add_replay(commands: Any) -> None:
    replay_help = "repeat the learner's side of a run from its recorded batches, and compare"
    description = "Train on a run's recorded batches again, and compare losses and weights. See docs/replay.md."
    replay = commands.add_parser("replay", help=replay_help, description=description)
    replay.add_argument("folder", type=_path, metavar="RUN", help="run folder, e.g. runs/NAME")
    steps_help = "first and last step, e.g. 3:5, 3: or :5 (default: all recorded steps)"
    replay.add_argument("--steps", type=_step_range, default=(None, None), metavar="A:B", help=steps_help)
    out_help = "empty or new folder for metrics and export (default: RUN/replay, which is replaced)"
    replay.add_argument("--out", type=_path, metavar="FOLDER", help=out_help)
    replay.add_argument("--ranks", type=int, metavar="N", help="number of ranks (default: as in the run)")
    replay.add_argument("--part", type=_path, help=argparse.SUPPRESS)  # for the learners that a replay starts
    _add_overrides(replay)
    replay.set_defaults(run=_run_replay)


def _add_config(parser: argparse.ArgumentParser, *, is_positional: bool = False) -> None:
    if is_positional:
        parser.add_argument("config", type=_path, metavar="FILE", help="mesh file (YAML)")
    else:
        parser.add_argument("--config", type=_path, required=True, metavar="FILE", help="mesh file (YAML)")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a setting, e.g. training.max_staleness=0; may be repeated",
    )


def _add_chaos(commands: Any) -> None:
    chaos = commands.add_parser(
        "chaos",
        help="kill, freeze or slow down a process of a running mesh",
        description="Kill, freeze or slow down a process of a running mesh. Without an action, list its processes.",
        epilog="Examples: `rollmesh chaos runs/x --kill reward`; `rollmesh chaos runs/x --freeze redis --for 5`; "
        "`rollmesh chaos runs/x --slow learner --by 4 --for 30`; `rollmesh chaos runs/x --kill reward --when scoring "
        "--after-step 3`; `rollmesh chaos runs/x --random --seed 1 --every 20 --for 600`. See docs/chaos.md.",
    )
    seconds, moments = _number(0.1, 86_400), ", ".join(CHAOS_MOMENTS)
    chaos.add_argument("folder", type=_path, metavar="RUN", help="run folder, e.g. runs/NAME")
    action = chaos.add_mutually_exclusive_group()
    action.add_argument("--kill", metavar="NAME", help="send SIGKILL")
    action.add_argument("--freeze", metavar="NAME", help="stop it, and let it go on after --for seconds")
    action.add_argument("--slow", metavar="NAME", help="stop it again and again for --for seconds")
    action.add_argument("--random", action="store_true", help="draw processes and actions for --for seconds")
    chaos.add_argument("--for", type=seconds, default=10.0, dest="duration_s", metavar="SECONDS", help="default: 10")
    chaos.add_argument("--by", type=_number(1.1, 100), default=4.0, metavar="FACTOR", help="times slower; default: 4")
    chaos.add_argument("--when", choices=CHAOS_MOMENTS, default="", metavar="MOMENT", help=f"wait for one of {moments}")
    chaos.add_argument("--after-step", type=int, default=0, metavar="N", help="wait until step N is trained")
    chaos.add_argument("--seed", type=int, default=0, help="of --random; default: 0")
    chaos.add_argument("--every", type=seconds, default=20.0, metavar="SECONDS", help="of --random; default: 20")
    chaos.add_argument("--among", default="", metavar="NAMES", help="of --random: names with commas between them")
    chaos.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    chaos.set_defaults(run=_run_chaos)


def _number(lowest: float, highest: float) -> Callable[[str], float]:
    """Return a parser of numbers within bounds."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if lowest <= (number := float(text)) <= highest:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {lowest:g} to {highest:g}")

    return parse


def _path(text: str) -> Path:
    """Return a path with its ``~`` replaced: the shell does not replace the ``~`` of ``--config=~/mesh.yaml``."""
    return Path(os.path.expanduser(text))


def _step_range(text: str) -> tuple[int | None, int | None]:
    """Return the first and the last step of "3:5", "3:", ":5" or "3"; None for a step that is left out."""
    first, colon, last = text.partition(":")
    try:
        parts = [int(part) if part else None for part in (first, last if colon else first)]
    except ValueError:
        parts = [0]
    if any(part is not None and part < 1 for part in parts) or (parts == [None, None] and not colon):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of steps; write it as 3:5, 3: or :5")
    return parts[0], parts[1]


def _default_name(service: str) -> str:
    return "rollout-0" if service == "rollout" else service


def _services(module: str) -> Any:
    """Import a module of the services, e.g. "config" for ``services.config``.

    Only a checkout or an image holds the services. The package beside this one is taken, even where the user has
    another package called ``services``.

    Raises:
        ConfigError: the services are not installed.
    """
    checkout = str(Path(rollmesh.__file__).resolve().parents[1])
    if (Path(checkout) / "services" / "config.py").exists() and sys.path[0] != checkout:
        sys.path.insert(0, checkout)
    try:
        importlib.import_module("services")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "installation",
            "the services are not installed; this is the client library alone",
            "run from a checkout of RollMesh (`make setup`) or one of its images",
        ) from error
    return importlib.import_module(f"services.{module}")


def _load(args: argparse.Namespace) -> Any:
    """Load a file that describes a mesh."""
    return _services("config").load_mesh(args.config, args.overrides)


def _load_any(args: argparse.Namespace) -> Any:
    """Load a file that describes a mesh or the scorers alone."""
    return _services("config").load_config(args.config, args.overrides)


def _run_up(args: argparse.Namespace) -> int:
    output.install(is_dispensable=True)
    config = _load(args)
    if args.resume:
        return int(_services("launcher.resume").resume(config))
    return int(_services("launcher.main").up(config, should_overwrite=args.overwrite))


def _run_resume(args: argparse.Namespace) -> int:
    output.install(is_dispensable=True)
    return int(_services("launcher.resume").resume_folder(args.folder, args.overrides))


def _run_service(args: argparse.Namespace) -> int:
    output.install(is_dispensable=True)
    faulthandler.enable()
    if args.service != "reward":
        # For the Python processes that vLLM and torch start. Processes of a reward function keep Python's own rule.
        os.environ["PYTHONSAFEPATH"] = "1"
    _die_with_launcher()
    config = _load_any(args) if args.service in SCORERS else _load(args)
    # A learner of several ranks starts itself again, once for each rank. It reads both variables for that.
    os.environ["ROLLMESH_CONFIG"] = str(args.config.resolve())
    os.environ["ROLLMESH_OVERRIDES"] = json.dumps(args.overrides)
    name = args.name or _default_name(args.service)
    return int(_service(args.service, "main").main(config, name))


def _service(service: str, module: str) -> Any:
    """Import a module of a service.

    Raises:
        ConfigError: a package that the service needs is not installed.
    """
    try:
        return _services(f"{service}.{module}")
    except ModuleNotFoundError as error:
        problem, fix = f"the package {error.name!r} is missing here", f"install rollmesh[{service}]"
        raise ConfigError(f"rollmesh {service}", problem, fix) from error


def _die_with_launcher() -> None:
    """Let Linux end this process when the launcher ends in any way.

    The launcher puts its process id into the environment of each service.
    """
    parent = os.environ.get("ROLLMESH_LAUNCHER_PID")
    if parent is None or not sys.platform.startswith("linux"):
        return
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit(EXIT_FAILED)


def _run_status(args: argparse.Namespace) -> int:
    return int(_services("launcher.status").show(_load_any(args), is_json=args.is_json))


def _run_why(args: argparse.Namespace) -> int:
    return int(_services("launcher.why").show(os.path.expanduser(args.target), is_json=args.is_json))


def _run_checkpoints(args: argparse.Namespace) -> int:
    return int(_services("launcher.checkpoints").show(args.folder, is_json=args.is_json))


def _run_chaos(args: argparse.Namespace) -> int:
    chaos = _services("launcher.chaos")
    if args.random:
        return int(
            chaos.strike_at_random(
                args.folder,
                [name for name in args.among.split(",") if name],
                seed=args.seed,
                every_s=args.every,
                total_s=args.duration_s,
                is_dry_run=args.dry_run,
            )
        )
    for action in ("kill", "freeze", "slow"):
        if name := getattr(args, action):
            duration_s, factor = 0.0 if action == "kill" else args.duration_s, args.by if action == "slow" else 0.0
            planned = chaos.Strike(name, action, duration_s, factor, moment=args.when, after_step=args.after_step)
            return int(chaos.strike(args.folder, planned, is_dry_run=args.dry_run))
    return int(chaos.show(args.folder))


def _run_replay(args: argparse.Namespace) -> int:
    if args.part is not None:
        faulthandler.enable()
        _die_with_launcher()
        return int(_service("learner", "replay_main").main(args.part))
    return int(_services("launcher.replay").show(args.folder, args.steps, args.out, args.ranks, args.overrides))


def _run_report(args: argparse.Namespace) -> int:
    print(_services("launcher.report").write_report(args.folder))
    return EXIT_OK


def _run_config_check(args: argparse.Namespace) -> int:
    config = _load_any(args)
    _services("launcher.main").print_findings(config)
    print(f"{args.config}: ok")
    return EXIT_OK


def _run_config_show(args: argparse.Namespace) -> int:
    print(_services("config").dump_mesh(_load_any(args)), end="")
    return EXIT_OK


def _run_config_schema(args: argparse.Namespace) -> int:
    print(json.dumps(_services("config").MeshConfig.model_json_schema(), indent=2))
    return EXIT_OK


if __name__ == "__main__":
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the working directory, which `python -m` puts there; a user's redis.py may lie in it
    raise SystemExit(main())
