"""The command `distill`, for what comes after training. Nothing heavy is imported before there is something to do."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from distill import layout
from distill.errors import UserError, fail

EPILOG = """examples (RUN is a folder that train.py wrote; predict and benchmark also take an export folder itself):
  distill predict RUN "Deutschland" "Kanada" --top 3       what the student says, from RUN/export alone
  distill evaluate RUN                                     test accuracy of each exported format, beside report.json
  distill benchmark RUN RUN --threads 1 --batch 1          latency and throughput, measured in turn
  distill export RUN --to DIR                              write the export again from checkpoints/best.ckpt
  distill compare RUN RUN RUN                              one row a student: mean and spread over seeds
  distill results RUN RUN RUN --name digits                keep them in results/digits.json and refresh the tables

Exit status: 0, or 1 with one line on stderr where something is wrong, or 130 after Ctrl-C."""


class Parser(argparse.ArgumentParser):
    """Reports mistakes as the rest of the command does."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see: {self.prog} --help")


class Version(argparse.Action):
    """Prints the installed version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        try:
            print(f"distill {metadata.version('distill')}")
        except metadata.PackageNotFoundError:
            fail("distill is not installed, so it has no version; install it: pip install -e .")
        sys.exit(0)


def positive(text: str) -> int:
    """A whole number >= 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return value


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit status 0, 1 for a user's mistake or a measurement that differs, 130 for Ctrl-C."""
    try:
        arguments = parser().parse_args(argv)
        arguments.command(arguments)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error).splitlines()[0])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def parser() -> Parser:
    """Every command with its options."""
    top = Parser(
        prog="distill",
        description="Work with the run folders that train.py writes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    commands = top.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def add(name: str, command: Any, text: str, *, runs: str | None = None, as_json: bool = True) -> Parser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(command=command)
        made.add_argument("run", metavar="RUN", type=Path, nargs=runs, help="folder that train.py wrote")
        if as_json:
            made.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return made

    command = add("predict", predict, "classify texts or image files with the exported student alone")
    command.add_argument("inputs", metavar="INPUT", nargs="+", help="a text, or the path of an image")
    command.add_argument("--top", metavar="K", type=positive, default=1, help="labels to show (default: 1)")
    add(
        "evaluate",
        evaluate,
        "measure the test accuracy of each exported format again; exit status 1 if it is not the reported one",
    )
    command = add(
        "benchmark", benchmark, "measure latency and throughput of each exported format, side by side", runs="+"
    )
    command.add_argument("--threads", metavar="N", type=positive, default=1, help="CPU threads (default: 1)")
    command.add_argument("--batch", metavar="N", type=positive, default=1, help="examples in a call (default: 1)")
    command.add_argument("--repeats", metavar="N", type=positive, default=100, help="timed calls (default: 100)")
    command = add("export", export, "write the export again from the best checkpoint", as_json=False)
    command.add_argument("--to", metavar="DIR", type=Path, help="write there (default: RUN/export)")
    add("compare", compare, "show runs in one table, mean and standard deviation over seeds", runs="+")
    command = add(
        "results",
        results,
        "record runs in results/NAME.json and refresh results/README.md and README.md here",
        runs="+",
        as_json=False,
    )
    command.add_argument("--name", metavar="NAME", required=True, help="of the results file, e.g. digits")
    return top


def predict(args: argparse.Namespace) -> None:
    folder = layout.export_of(args.run)
    if layout.library_of(folder) == "timm":
        for path in args.inputs:
            layout.image_file(path)
    from distill import predict as predicting
    from distill import show
    from distill.quiet import quiet

    quiet()
    found = predicting.predict(folder, args.inputs, args.top)
    if args.json:
        show.as_json([asdict(one) for one in found])
    else:
        show.table(predicting.table(found))


def evaluate(args: argparse.Namespace) -> None:
    layout.export_of(args.run)
    layout.report_of(args.run)
    layout.config_of(args.run)
    from distill import revisit, show
    from distill.quiet import quiet

    quiet()
    with show.working("measuring on the test split"):
        found = revisit.evaluate(args.run)
    if args.json:
        show.as_json(found)
    else:
        show.evaluation(found)
    if found["differences"]:
        fail(f"{args.run}: {'; '.join(found['differences'])}: the export or the software is not that of the report")


def benchmark(args: argparse.Namespace) -> None:
    exports = {str(run): layout.export_of(run) for run in args.run}
    from distill import benchmark as timing
    from distill import show
    from distill.quiet import quiet

    quiet()
    with show.working("timing"):
        found = timing.benchmark(exports, threads=args.threads, batch=args.batch, repeats=args.repeats)
    if args.json:
        show.as_json(found)
    else:
        show.benchmark(found)


def export(args: argparse.Namespace) -> None:
    layout.config_of(args.run)
    layout.checkpoint_of(args.run)
    from distill import revisit, show
    from distill.quiet import quiet

    quiet()
    with show.working("exporting and checking"):
        folder, differences = revisit.export(args.run, args.to)
    for name, difference in differences.items():
        print(f"{name}: logits differ by at most {difference:.2g} from PyTorch")
    print(f"export: {folder}")


def compare(args: argparse.Namespace) -> None:
    from distill import compare as comparing
    from distill import show

    rows = comparing.compare(args.run)
    if args.json:
        print(comparing.to_json(rows), end="")
    else:
        show.comparison(rows)


def results(args: argparse.Namespace) -> None:
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise UserError(f"--name {args.name}: is not the name of a file; use letters, digits, - and _")
    from distill import compare as comparing

    for path in comparing.record(args.run, args.name, Path("results"), Path("README.md")):
        print(path)


if __name__ == "__main__":
    main()
