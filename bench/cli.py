"""The command line: `python -m bench [command] [options]`; without a command it runs the main benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from bench import script, timing, workloads
from bench.peers import HYPER, PEERS
from bench.suites import SUITES

DESCRIPTION = """\
Measures optimizer steps: fusedopt against torch.optim and every other optimizer that is installed.
Without a command: the main job, which takes some minutes."""

WIDTH = 150
"""Columns of text that goes to a file or a pipe."""

EPILOG = """\
examples:
  python -m bench                                     the main job: table, JSON lines, PNG, HTML report
  python -m bench --quick                             the same in a minute, with wide intervals
  python -m bench --workload vit-l 5000x64 --optimizer adamw --dtype bfloat16
  python -m bench --suite sizes counts                what the report's curves are drawn from
  python -m bench --peer torch-fused deepspeed-cpu fusedopt-cpu --workload gpt2-124m
  python -m bench list                                workloads, suites, and which peers are here
  python -m bench profile --workload gpt2-124m        why it takes what it takes
  python -m bench compare OLD.jsonl NEW.jsonl         exits with 1 if something got slower
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", metavar="command")
    _add_run(commands.add_parser("run", help="measure (the default)", description="Measures cases and reports them."))
    commands.add_parser("list", help="show workloads, suites and peers").add_argument(
        "--device", choices=("cpu", "cuda"), default=default_device(), help="whose peers to look for"
    )
    _add_report(commands)
    _add_roofline(commands)
    _add_compare(commands)
    _add_gate(commands)
    _add_profile(commands)
    _add_train(commands)
    return top


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _add_device(command: argparse.ArgumentParser, default: str | None = None) -> None:
    command.add_argument(
        "--device", choices=("cpu", "cuda"), default=default or default_device(), help="where (default: %(default)s)"
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    everything = ", ".join(workloads.names())
    _add_device(command)
    command.add_argument(
        "--suite",
        nargs="+",
        choices=[*SUITES, "all"],
        metavar="SUITE",
        help=f"sets of cases: {', '.join(SUITES)} or all (default: main)",
    )
    command.add_argument(
        "--workload",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"workloads instead of a suite: COUNTxNUMEL or one of {everything}",
    )
    command.add_argument("--optimizer", nargs="+", choices=list(HYPER), help="with --workload (default: adamw sgd)")
    command.add_argument(
        "--dtype", nargs="+", choices=list(workloads.DTYPES), help="with --workload (default: float32)"
    )
    command.add_argument(
        "--gradients",
        nargs="+",
        choices=timing.GRADIENTS,
        help="with --workload: how gradients appear (default: kept)",
    )
    command.add_argument(
        "--peer", nargs="+", metavar="NAME", help=f"who takes part (default: who is here): {', '.join(PEERS)}"
    )
    command.add_argument(
        "--threads",
        nargs="+",
        default=["1", "all"],
        metavar="N",
        help="CPU threads: numbers, or all (default: 1 all)",
    )
    command.add_argument("--quick", action="store_true", help="few rounds: a first look with wide intervals")
    command.add_argument("--budget", type=float, metavar="SECONDS", help="time to spend on the rounds of each case")
    command.add_argument(
        "--out",
        type=script.folder,
        metavar="FOLDER",
        help="where the files go, replacing those of before (default: bench/results/<machine>, named by date;"
        " out/bench with --quick or --workload)",
    )


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("report", help="make the HTML report and the picture again from results")
    command.add_argument("results", nargs="+", type=Path, help="JSON lines files, or folders of them")
    command.add_argument(
        "--out", type=script.folder, required=True, metavar="FOLDER", help="where report.html and the PNG go"
    )


def _add_roofline(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("roofline", help="predict step times, and hold predictions against results")
    command.add_argument("results", nargs="*", type=Path, help="JSON lines files, or folders of them, to hold against")
    command.add_argument("--gpu", nargs="+", metavar="NAME", help="GPUs to predict for (default: every known one)")


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="say what got slower from one run to another",
        description="Exits with 1 if something got slower.",
    )
    command.add_argument("old", type=Path, help="JSON lines of the run to compare with")
    command.add_argument("new", type=Path, help="JSON lines of the run in question")
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.03,
        help="slowdown that is let pass beyond the intervals (default: %(default)s)",
    )


def _add_gate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "gate",
        help="short check for CI that fusedopt keeps its lead over torch fused",
        description="Times fusedopt and torch fused in this process. Exits with 1 if a ratio is below its"
        " floor, with 2 if it cannot run.",
    )
    command.add_argument("--backend", help="backend of fusedopt (default: the one named like the device)")
    _add_device(command, default="cpu")  # the floors that CI holds are the CPU's


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "profile", help="launches, kernels, bandwidth, Python time and a Chrome trace of one case"
    )
    _add_device(command)
    command.add_argument("--workload", required=True, help="COUNTxNUMEL or a name")
    command.add_argument("--optimizer", choices=list(HYPER), default="adamw", help="(default: %(default)s)")
    command.add_argument("--dtype", choices=list(workloads.DTYPES), default="float32", help="(default: %(default)s)")
    command.add_argument("--gradients", choices=timing.GRADIENTS, default="kept", help="(default: %(default)s)")
    command.add_argument(
        "--peer",
        nargs="+",
        metavar="NAME",
        help="whom to profile (default: fusedopt's backends that are here)",
    )
    command.add_argument("--threads", default="all", metavar="N", help="CPU threads: a number, or all (default: all)")
    command.add_argument("--steps", type=int, default=20, help="steps to look at (default: %(default)s)")
    command.add_argument(
        "--out",
        type=script.folder,
        default=Path("out/profile"),
        metavar="FOLDER",
        help="where traces go (default: %(default)s)",
    )
    command.add_argument("--no-ncu", action="store_true", help="leave Nsight Compute alone even where it is installed")


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("train", help="train real models to a given loss with torch.optim and with fusedopt")
    _add_device(command)
    command.add_argument(
        "--model",
        nargs="+",
        choices=("charlm", "digits"),
        default=["charlm", "digits"],
        help="(default: both)",
    )
    command.add_argument("--steps", type=int, help="training steps (default: each model's own)")
    command.add_argument("--loss", type=float, help="validation loss to reach (default: each model's own)")
    command.add_argument("--backend", help="backend of fusedopt (default: chosen for the device)")
    command.add_argument(
        "--out", type=script.folder, metavar="FOLDER", help="where the files go (default: bench/results/<machine>)"
    )


def console() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 fine, 1 a gate is shut, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    top = parser()
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["run", *words]
    options = top.parse_args(words)
    from bench import commands

    try:
        if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda was asked for, but torch finds no CUDA device")
        return commands.COMMANDS[options.command](options, console())
    except (ValueError, OSError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m bench: interrupted; cases that were done are kept", file=sys.stderr)
        return 130
