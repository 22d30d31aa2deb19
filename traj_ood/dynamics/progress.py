"""A progress bar over images, also within a batch, whose trajectories may take minutes."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from traj_ood.text import printable


class StepBar:
    """Progress bar over images: counts those that have ended, and shows the step and the number of those that go on.

    Args:
        total: number of images.
        title: what is done with them. Default: set by :meth:`begin`.
        quiet: no progress bar. Default false. Otherwise it appears after two seconds.
    """

    def __init__(self, total: int, title: str = "", *, quiet: bool = False) -> None:
        # With tqdm's own miniters, steps in which no image ends would not be shown once several have ended at a time.
        settings: dict[str, Any] = {"unit": "img", "delay": 2, "miniters": 0, "dynamic_ncols": True, "leave": False}
        self._bar = tqdm(total=total, desc=printable(title) or None, disable=quiet, **settings)
        self._read = self._finished = 0

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def begin(self, count: int, title: str = "") -> None:
        """Record that ``count`` more images have been read, and change the title if one is given."""
        self._read += count
        if title:
            self._bar.set_description(printable(title), refresh=False)

    def on_step(self, step: int, running: int) -> None:
        """Show a step of the images that have been read; the argument of :func:`traj_ood.iterate`."""
        self._bar.set_postfix(step=step, running=running, refresh=False)
        self._show(self._read - running)

    def finish(self, count: int) -> None:
        """Count ``count`` images that have been read as finished, whether or not they took steps."""
        self._finished += count
        self._show(self._finished)

    def skip(self, count: int) -> None:
        """Count images for which nothing is left to do."""
        self.begin(count)
        self.finish(count)

    def _show(self, ended: int) -> None:
        self._bar.update(max(0, ended - self._bar.n))
