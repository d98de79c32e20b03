"""The command ``deeplab-fast``. A subcommand is a module with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import evaluate, info, segment, train
from .errors import UserError

COMMANDS = (segment, train, evaluate, info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0: done. 1: done except for the inputs named on stderr. 2: could not start, or wrong
        arguments. 130: interrupted.

    >>> main(["segment", "photo.jpg", "--weights", "deeplabv3_resnet50"])
    0
    """
    parser = argparse.ArgumentParser(
        prog="deeplab-fast", description="DeepLab-v3 semantic segmentation."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)

    # A file name need not be printable in the terminal's encoding.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"deeplab-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deeplab-fast: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # of standard output: everything else is a UserError by now
        # Python flushes once more at exit and would complain (signal module, "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the reader of a pipe left, as `head` does
            print(f"deeplab-fast: {error}", file=sys.stderr)
        return 1
