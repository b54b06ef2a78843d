"""The ``infoprune`` command: one file per verb; parse, call one function, print."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import warnings

import typer
from rich.text import Text

from infoprune.cli.console import error_console, plain

app = typer.Typer(
    name="infoprune",
    help="Compress vision-language models by information theory: smaller, faster, and with the loss in numbers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: errors the user can mend become one message and exit status 2."""
    _quiet_libraries()
    from infoprune.cli import ask, compress, evaluate, export, families, inspect, plan
    from infoprune.errors import InfoPruneError, out_of_memory

    signal.signal(signal.SIGINT, _interrupt)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # what a scheduler sends; launchers end their processes by it, and they shall not wait
        signal.signal(signal.SIGTERM, _interrupt)
    for module in (inspect, compress, evaluate, ask, plan, export, families):
        module.register(app)
    try:
        app()
    except SystemExit as end:
        if not end.code and "torch" in sys.modules:
            from infoprune.training.loop import leave_processes

            leave_processes()
        raise
    except InfoPruneError as error:
        _fail(str(error), 2)
    except _Interrupted:
        _fail("Interrupted. Nothing half-written was left behind.", 130)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        told = next(iter(str(error).splitlines()), "").partition(" GPU ")[0]
        _fail(
            f"The device ran out of memory ({told}). Let the processor make less of an image (max_pixels, or the number of tiles), train "
            "without --recovery, or use a larger device.",
            2,
        )
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(
                f"The disk is full ({error.filename or 'while writing'}). Free some space and run again; nothing half-written was left.", 2
            )
        if error.filename is None:
            raise
        from infoprune.demo.sources import cache_directory

        hint = " The variable INFOPRUNE_CACHE names another cache folder." if str(error.filename).startswith(str(cache_directory())) else ""
        _fail(f"{error.filename}: {error.strerror}.{hint}", 2)


class _Interrupted(BaseException):
    """Ctrl-C under a name that Typer does not swallow; temporary folders are cleaned up on its way out."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def _fail(message: str, status: int) -> None:
    error_console.print(Text.assemble(("error:", "bold red"), " ", plain(message)), highlight=False, soft_wrap=True)
    sys.exit(status)


def _quiet_libraries() -> None:
    # Other libraries' bars and notices would drown ours; their errors still arrive as exceptions.
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
