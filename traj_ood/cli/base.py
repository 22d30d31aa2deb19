"""The command group, options that several commands share, and one-line errors."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from traj_ood.cli.console import fail, lost, note, prepare
from traj_ood.errors import TrajOODError, UnreadableImageError, is_out_of_memory
from traj_ood.evaluation.parallel import TeammateError, is_main_process
from traj_ood.io.options import MAX_INT

if TYPE_CHECKING:
    import torch

    from traj_ood.autoencoders import Autoencoder
    from traj_ood.data import Benchmark, Reading
    from traj_ood.data.records import Opening

_F = TypeVar("_F", bound=Callable[..., Any])
_MAX_THREADS = 1024  # OpenMP aborts the process if many more are requested
_BROKEN_PIPE = 128 + 13  # exit code of a process ended by SIGPIPE, as reported by the shell
_TRACEBACK = "TRAJ_OOD_TRACEBACK"
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Name(click.ParamType):
    """A non-empty text; an empty path would mean the working directory."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value or "\0" in value:
            self.fail("expected a name, got an empty one" if not value else "expected a name without NUL", param, ctx)
        return str(value)


class _PathName(_Name):
    """A non-empty path, in which ``~`` is the home folder: shells leave it as it is in ``--out=~/rows.csv``."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # type: ignore[override]
        try:
            return value if isinstance(value, Path) else Path(super().convert(value, param, ctx)).expanduser()
        except RuntimeError:
            self.fail(f"expected a path, got {value!r} and no such home folder: write it without ~", param, ctx)


NAME, PATH = _Name(), _PathName()
SEED = click.IntRange(0, MAX_INT)
BIT_DEPTH = click.Choice(["10", "12", "14", "16"])

_SHARED = {
    "data_root": click.option("--data-root", type=PATH, help="Folder of the images of a benchmark or list."),
    "device": click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    "threads": click.option(
        "--threads", type=click.IntRange(1, _MAX_THREADS), help="CPU threads for computing.  [default: all]"
    ),
    "follow_links": click.option(
        "--follow-links", is_flag=True, help="Let image lists follow links out of their root."
    ),
    "batch_size": click.option(
        "--batch-size", type=int, help="Images per batch; does not change results.  [default: by memory]"
    ),
    "workers": click.option("--workers", type=int, default=2, show_default=True, help="Threads that read images."),
    "on_error": click.option(
        "--on-error",
        type=click.Choice(["raise", "skip"]),
        default="raise",
        show_default=True,
        help="What to do with images that cannot be read.",
    ),
    "tol": click.option(
        "--tol", type=float, default=1e-5, show_default=True, help="Tolerance on the squared residual."
    ),
    "max_steps": click.option(
        "--max-steps", type=int, default=500, show_default=True, help="Largest number of evaluations of f per image."
    ),
    "compile": click.option(
        "--compile",
        is_flag=True,
        help="Run f through torch.compile, which takes seconds to start and changes scores by up to 1e-5, relative. If "
        "it fails, f runs uncompiled, with a warning.",
    ),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="No progress bars; for logs."),
    "input_size": click.option(
        "--input-size",
        type=click.IntRange(1),
        help="Side of the model's images, if it can be chosen (timm:, diffusers:).  [default: as declared]",
    ),
    "quote_formulas": click.option(
        "--quote-formulas/--no-quote-formulas",
        default=True,
        show_default=True,
        help="In CSV, put ' before texts that a spreadsheet would evaluate (they begin with = + - @).",
    ),
    "exif": click.option("--exif", is_flag=True, help="Rotate photographs according to EXIF."),
    "bit_depth": click.option(
        "--bit-depth", type=BIT_DEPTH, help="Used bits in 16-bit files.  [default: as the files say]"
    ),
    "stride": click.option(
        "--stride", type=click.IntRange(1), default=1, show_default=True, help="Read every n-th frame of a video."
    ),
    "allow": click.option(
        "--allow",
        multiple=True,
        envvar="TRAJ_OOD_ALLOW",
        metavar="ADDRESS",
        help="Prefix of addresses that may be opened, such as s3://bucket/. Repeatable.  [default: none]",
    ),
}


def shared(*names: str) -> Callable[[_F], _F]:
    """Decorator that adds options that several commands have, in this order."""

    def add(command: _F) -> _F:
        for name in reversed(names):
            command = _SHARED[name](command)
        return command

    return add


_CONTINUING = ("analyze", "bench", "calibrate", "fit", "train")
"""Commands that keep what is finished. ``score`` does, too, and says it itself."""


class _Command(click.Command):
    """A command with the option ``--import``, which runs the user's files first, and with errors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        own = click.Option(
            ["--import"],
            multiple=True,
            type=NAME,
            metavar="FILE.py|MODULE",
            help="Run your own Python file first, to register scorers, models, benchmarks or questions. Repeatable.",
        )
        self.params.append(own)

    def invoke(self, ctx: click.Context) -> Any:
        skips = any(param.name == "on_error" for param in self.params)
        with _one_line_errors(continues=self.name in _CONTINUING, skips=skips):
            for source in ctx.params.pop("import"):
                from traj_ood.io.extensions import import_extension

                import_extension(source)
            return super().invoke(ctx)


class _OneLine(click.Group):
    """A group that prints click's own errors as one line, like all others."""

    command_class = _Command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands with the whole first sentence of each, which click cuts off at the end of a line."""
        found = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        rows = [(name, command.get_short_help_str(1000)) for name, command in found if command is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **options)
        prepare()
        try:
            code = run(*args, standalone_mode=False, **options)
        except click.ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # `traj-ood` alone; by name, as older click lacks the class
                error.show()
                sys.exit(error.exit_code)
            context = getattr(error, "ctx", None)
            more = f" See {context.command_path} --help." if context is not None else ""
            fail(f"{error.format_message()}{more}", error.exit_code)
        except click.Abort:
            note("traj-ood: interrupted")
            sys.exit(130)
        except OSError as error:  # in --help and --version, which click itself prints
            fail(lost(error), 2)
        sys.exit(code if isinstance(code, int) else 0)


def examples(*lines: str) -> str:
    """An epilog with example commands, one per line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


@contextmanager
def _one_line_errors(continues: bool, skips: bool) -> Iterator[None]:
    """Context manager that turns errors into one line on stderr and an exit code.

    ``continues``: whether the command, started again, goes on where it was interrupted; the line then says so.
    ``skips``: whether the command can skip an image that cannot be read; likewise.
    Bad input exits with code 2, an interruption with 130, and an unexpected exception with 70; for the latter,
    ``TRAJ_OOD_TRACEBACK=1`` shows the traceback.
    """
    try:
        yield
    except TeammateError:
        sys.exit(2)  # another process prints the error
    except UnreadableImageError as error:
        fail(f"{error}{'; or leave such images out with --on-error skip' if skips else ''}", 2)
    except TrajOODError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        if is_main_process():
            note(f"traj-ood: interrupted{'; the same command continues where this one stopped' if continues else ''}")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(_BROKEN_PIPE)
    except OSError as error:
        _refuse(f"{_words(error)}: correct the name, or fix its permissions", error, 2)
    except (MemoryError, OverflowError) as error:
        _refuse(f"{_words(error)}: expected sizes and numbers that this machine can take", error, 2)
    except Exception as error:
        if is_out_of_memory(error):
            _refuse(f"{_words(error)}: give a smaller --batch-size, or fewer images", error, 2)
        if isinstance(error, RuntimeError) and "home directory" in str(error):
            _refuse(f"{_words(error)}: write the path without ~, or set HOME", error, 2)
        _refuse(f"internal error: {_words(error)}; {_TRACEBACK}=1 shows the traceback; please report it", error, 70)


def _words(error: BaseException) -> str:
    """What an exception says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {str(error.filename or '')[:80]}".removesuffix(": ")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def _refuse(line: str, error: BaseException, code: int) -> NoReturn:
    if os.environ.get(_TRACEBACK):
        raise error
    fail(line, code)


def opening_of(options: Mapping[str, Any]) -> Opening:
    """The :class:`Opening` of the options ``stride`` and ``allow``."""
    from traj_ood.data.records import Opening

    return Opening(options["stride"], tuple(options["allow"]))


def comma_separated(text: str | None) -> tuple[str, ...]:
    """The non-empty parts of a comma-separated option."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def autoencoder_of(
    model: str,
    data: Benchmark,
    device: torch.device,
    input_size: int | None,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Autoencoder:
    """Load an autoencoder, with ``options`` of its family; for a backbone, its surrogate, trained on the training split
    of ``data`` or cached, with ``settings`` of :func:`traj_ood.surrogate_for`."""
    from traj_ood.autoencoders import load_autoencoder
    from traj_ood.backbones import LIBRARIES, is_backbone_spec, load_backbone
    from traj_ood.training.surrogate_cache import surrogate_for

    any_size = [*(f"{name}:" for name, library in LIBRARIES.items() if library.any_size), "diffusers:"]
    if input_size is not None and not model.startswith(tuple(any_size)):
        known = ", ".join(any_size)
        advice = "leave it out"
        if Path(model).expanduser().is_dir():  # which loads without the prefix, too, if it is of diffusers
            advice += "".join(f", or give {name}{model} if the folder is one of {name[:-1]}" for name in any_size)
        raise TrajOODError(f"--input-size applies to {known} models, not to {model}, whose size is fixed: {advice}")
    if not is_backbone_spec(model):
        side = {} if input_size is None else {"image_size": input_size}
        return load_autoencoder(model, **side, **(options or {})).to(device)
    backbone = model if input_size is None else load_backbone(model, input_size=input_size)
    return surrogate_for(backbone, data, device=device, **settings)


def reading_of(exif: bool, bit_depth: str | None) -> Reading:
    """The :class:`Reading` of the options ``exif`` and ``bit_depth``."""
    from traj_ood.data.decoding import Reading

    return Reading(exif, None if bit_depth is None else int(bit_depth))


@click.group(
    cls=_OneLine, context_settings=_CONTEXT, epilog=examples("traj-ood list", "traj-ood bench fashion --quick")
)
@click.version_option(package_name="traj_ood", prog_name="traj-ood")
def main() -> None:
    """Out-of-distribution detection with the latent dynamics of autoencoders, and fair comparisons of OOD scorers."""


def set_up(threads: int | None) -> None:
    """Prepare a command that computes: set the number of CPU threads, and silence messages of libraries.

    transformers logs its loading and the hub every retry; our progress bars and errors show what matters.
    """
    import torch

    from traj_ood.io.pretrained import silence_libraries

    silence_libraries()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged files, which our errors report
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")  # torch itself uses it
    if threads:
        torch.set_num_threads(threads)
