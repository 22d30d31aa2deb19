"""What every command shares: the group, one-line errors, examples under the help."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from traj_ood.errors import TrajOODError
from traj_ood.parallel import TeammateError, is_main_process

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def examples(*lines: str) -> str:
    """An epilog of commands to copy, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends in one line on stderr and exit code 2; an interruption says that nothing is lost."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except TeammateError:
            sys.exit(2)  # another process tells what went wrong
        except TrajOODError as error:
            click.echo(f"traj-ood: error: {' '.join(str(error).split())}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            if is_main_process():
                click.echo("traj-ood: interrupted; the same command continues where this one stopped", err=True)
            sys.exit(130)

    return wrapped


@click.group(context_settings=_CONTEXT, epilog=examples("traj-ood list", "traj-ood bench fashion --quick"))
@click.version_option(package_name="traj_ood", prog_name="traj-ood")
def main() -> None:
    """Out-of-distribution detection with the latent dynamics of autoencoders, and honest comparisons of OOD scorers."""


def silence_libraries() -> None:
    """transformers announces its loading and the hub every retry; our own bars and errors say what matters. What is
    warned of becomes a line like the others."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")  # torch's own derivatives use it
    warnings.showwarning = lambda message, *_, **__: click.echo(f"traj-ood: warning: {message}", err=True)
