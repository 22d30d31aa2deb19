"""What every command shares: the group, one-line errors, examples under the help."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from traj_ood.cli.console import fail, lost, note, prepare
from traj_ood.errors import TrajOODError
from traj_ood.evaluation.parallel import TeammateError, is_main_process
from traj_ood.io.options import MAX_INT

if TYPE_CHECKING:
    import torch

    from traj_ood.autoencoders import Autoencoder
    from traj_ood.data import Benchmark, Reading
    from traj_ood.data.records import Opening

_MOST_THREADS = 1024  # OpenMP aborts the process when it is asked for many more
_BROKEN_PIPE = 128 + 13  # what the shell reports of a filter that SIGPIPE ended
_TRACEBACK = "TRAJ_OOD_TRACEBACK"
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Name(click.ParamType):
    """A text that is not empty: as a path, an empty one would mean the working directory."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value or "\0" in value:
            self.fail("expected a name, got an empty one" if not value else "expected a name without NUL", param, ctx)
        return str(value)


class _PathName(_Name):
    """A path that is not empty."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # type: ignore[override]
        return value if isinstance(value, Path) else Path(super().convert(value, param, ctx))


NAME, PATH = _Name(), _PathName()
SEED, THREADS = click.IntRange(0, MAX_INT), click.IntRange(1, _MOST_THREADS)


quote_formulas_option = click.option(
    "--quote-formulas/--no-quote-formulas",
    default=True,
    show_default=True,
    help="In CSV, put ' before texts that a spreadsheet would run (they begin with = + - @).",
)


_IMPORTS = "traj_ood.imports"  # in the context's meta: what --import names


class _Command(click.Command):
    """A command with ``--import``, which runs the user's own files before anything else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = click.Option(
            ["--import"],
            multiple=True,
            type=NAME,
            metavar="FILE.py|MODULE",
            expose_value=False,
            callback=_remember_imports,
            help="Run your own Python file first: it registers scorers, models or benchmarks. Repeatable.",
        )
        self.params.append(own)


def _remember_imports(context: click.Context, _: click.Parameter, sources: tuple[str, ...]) -> None:
    context.meta[_IMPORTS] = sources


def _run_imports() -> None:
    context = click.get_current_context(silent=True)
    for source in context.meta.get(_IMPORTS, ()) if context is not None else ():
        from traj_ood.io.extensions import import_extension

        import_extension(source)


class _OneLine(click.Group):
    """click's own errors as one line, like all others."""

    command_class = _Command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        prepare()
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # `traj-ood` alone; older versions of click have no class
                error.show()
                sys.exit(error.exit_code)
            context = getattr(error, "ctx", None)
            more = f" See {context.command_path} --help." if context is not None else ""
            fail(f"{error.format_message()}{more}", error.exit_code)
        except click.Abort:
            note("traj-ood: interrupted")
            sys.exit(130)
        except OSError as error:  # of --help and --version, which click itself writes
            fail(lost(error), 2)
        sys.exit(code if isinstance(code, int) else 0)


def examples(*lines: str) -> str:
    """An epilog of commands to copy, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends in one line on stderr and exit code 2; an interruption says that nothing is lost.

    What nobody foresaw is one line, too, with exit code 70: a traceback is for us; ``TRAJ_OOD_TRACEBACK=1`` shows it.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            _run_imports()
            command(*args, **kwargs)
        except TeammateError:
            sys.exit(2)  # another process tells what went wrong
        except TrajOODError as error:
            fail(str(error), 2)
        except KeyboardInterrupt:
            if is_main_process():
                note("traj-ood: interrupted; the same command continues where this one stopped")
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(_BROKEN_PIPE)
        except OSError as error:
            _refuse(f"{_words(error)}: correct the name, or fix its permissions", error, 2)
        except (MemoryError, OverflowError) as error:
            _refuse(f"{_words(error)}: expected sizes and numbers that this machine can take", error, 2)
        except Exception as error:
            if re.search("out of memory|can't allocate memory", str(error)):  # of which torch makes a RuntimeError
                _refuse(f"{_words(error)}: give a smaller --batch-size, or fewer images", error, 2)
            if isinstance(error, RuntimeError) and "home directory" in str(error):
                _refuse(f"{_words(error)}: write the path without ~, or set HOME", error, 2)
            _refuse(
                f"a fault of traj_ood's own: {_words(error)}; {_TRACEBACK}=1 shows where; please report it", error, 70
            )

    return wrapped


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {str(error.filename or '')[:80]}".removesuffix(": ")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def _refuse(line: str, error: BaseException, code: int) -> NoReturn:
    if os.environ.get(_TRACEBACK):
        raise error
    fail(line, code)


compile_option = click.option(
    "--compile",
    is_flag=True,
    help="Run f through torch.compile: takes seconds to start, and scores move by up to 1e-5 relative. Falls back to f "
    "itself with a warning.",
)

BIT_DEPTH = click.Choice(["10", "12", "14", "16"])


def reading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--exif`` and ``--bit-depth``, for every command that reads image files."""
    for option in (
        click.option("--bit-depth", type=BIT_DEPTH, help="Bits used in 16-bit files.  [default: as the files say]"),
        click.option("--exif", is_flag=True, help="Turn photographs upright, as EXIF says."),
    ):
        command = option(command)
    return command


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--stride`` and ``--allow``, for every command that reads tar shards, Parquet, videos and addresses."""
    for option in (
        click.option(
            "--allow",
            multiple=True,
            envvar="TRAJ_OOD_ALLOW",
            metavar="ADDRESS",
            help="Beginning of addresses that may be opened, such as s3://bucket/; may be repeated.  [default: none]",
        ),
        click.option("--stride", type=click.IntRange(1), default=1, show_default=True, help="Of a video's frames."),
    ):
        command = option(command)
    return command


def opening_of(options: Mapping[str, Any]) -> Opening:
    """What these options ask for."""
    from traj_ood.data.records import Opening

    return Opening(options["stride"], tuple(options["allow"]))


input_size_option = click.option(
    "--input-size",
    type=click.IntRange(1),
    help="Side of the model's images, where it can change (timm:, diffusers:).  [default: as declared]",
)


def autoencoder_of(
    model: str,
    data: Benchmark,
    device: torch.device,
    input_size: int | None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Autoencoder:
    """The autoencoder ``model``; of a backbone the surrogate that is trained on the training split of ``data``, or was.

    Args:
        input_size: side of the model's images. options: of the autoencoder's family.
        settings: of :func:`traj_ood.surrogate_for`.
    Raises:
        TrajOODError: a size for a model whose size cannot be chosen; and whatever the loaders raise.
    """
    from traj_ood.autoencoders import load_autoencoder
    from traj_ood.backbones import LIBRARIES, is_backbone_spec, load_backbone
    from traj_ood.training.surrogate_cache import surrogate_for

    any_size = [*(f"{name}:" for name, library in LIBRARIES.items() if library.any_size), "diffusers:"]
    if input_size is not None and not model.startswith(tuple(any_size)):
        known = ", ".join(any_size)
        raise TrajOODError(
            f"--input-size belongs to {known} models, not to {model}, which has a size of its own: leave it out"
        )
    if not is_backbone_spec(model):
        side = {} if input_size is None else {"image_size": input_size}
        return load_autoencoder(model, **side, **(options or {})).to(device)
    backbone = model if input_size is None else load_backbone(model, input_size=input_size)
    return surrogate_for(backbone, data, device=device, **settings)


def reading_of(exif: bool, bit_depth: str | None) -> Reading:
    """What these options ask for."""
    from traj_ood.data.decoding import Reading

    return Reading(exif, None if bit_depth is None else int(bit_depth))


@click.group(
    cls=_OneLine, context_settings=_CONTEXT, epilog=examples("traj-ood list", "traj-ood bench fashion --quick")
)
@click.version_option(package_name="traj_ood", prog_name="traj-ood")
def main() -> None:
    """Out-of-distribution detection with the latent dynamics of autoencoders, and honest comparisons of OOD scorers."""


def silence_libraries() -> None:
    """transformers announces its loading and the hub every retry; our own bars and errors say what matters."""
    from traj_ood.io.pretrained import silence_transformers

    silence_transformers()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, which our own errors tell, one line each
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")  # torch's own derivatives use it
