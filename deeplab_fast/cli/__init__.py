"""The command ``deeplab-fast``. Each subcommand is a module with an ``add_parser``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import accelerate_report, convert, evaluate, export, info, segment, train, tune
from .allocator import keep_freed_memory
from .errors import UserError

COMMANDS = (segment, train, evaluate, convert, export, tune, info, accelerate_report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments; by default those of the process.

    Returns:
        0: success. 1: some inputs or kernels, named on stderr, failed. 2: wrong arguments, or the
        command failed. 130: interrupted.

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

    # The terminal's encoding may not have all characters of a file name.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        if argv is None:  # otherwise the process is the caller's
            keep_freed_memory()
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"deeplab-fast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("deeplab-fast: interrupted", file=sys.stderr)
        return 130
    except OSError as error:  # an error of standard output; all others are UserErrors
        # Python flushes again at exit, which must not fail (signal module, "Note on SIGPIPE").
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # raised if a pipe, to `head` say, was closed
            print(f"deeplab-fast: {error}", file=sys.stderr)
        return 1
