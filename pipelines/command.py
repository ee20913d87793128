"""The command line that all pipeline programs share: `--config FILE`, repeated `--set a.b=value`, `--dry-run`.

What a user can mend is printed as one line on standard error and ends with status 2; anything else is a fault of ours
and keeps its traceback. Called by the `main` of each module here; knows nothing of what a stage does.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from sparsight.config import RunConfig, dump, load
from sparsight.errors import one_line, user_error

USER_ERROR = 2
INTERRUPTED = 130

Plan = Callable[[RunConfig], Sequence[str]]
"""The steps that a stage would take, one line each, computed without taking them."""


def run_command(
    description: str, action: Callable[[RunConfig], object], argv: Sequence[str] | None = None, plan: Plan | None = None
) -> int:
    """Load the configuration and run `action` with it; the exit status is returned.

    With `--dry-run` the resolved configuration and the plan are printed instead.
    """
    return run_with(parser_of(description).parse_args(argv), action, plan)


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that all programs have; a program may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="the YAML file of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=value", dest="overrides", help="replace one setting"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and plan, then stop")
    return parser


def run_with(arguments: argparse.Namespace, action: Callable[[RunConfig], object], plan: Plan | None = None) -> int:
    """`run_command` for arguments that are parsed already."""
    _quiet_bars()
    try:
        config = load(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(dump(config), end="")
            for step in plan(config) if plan is not None else ():
                print(f"# {step}")
            return 0
        action(config)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        mendable = user_error(error)
        if mendable is None:
            raise
        print(f"error: {one_line(mendable)}", file=sys.stderr)
        return USER_ERROR
    return 0


def _quiet_bars() -> None:
    """The bars of a library that loads models follow the rule of ours: none where standard error is no terminal."""
    if not sys.stderr.isatty() and "transformers" in sys.modules:  # the stage that needs no model does not wait for it
        from transformers.utils import logging

        logging.disable_progress_bar()
