"""Settings of the whole suite: threads, and what ``make test`` leaves to ``make test-all``."""

from __future__ import annotations

import os

# One thread per process, set before any library counts the cores: the models here are tiny, threads that wait for each
# other cost more than they compute, and every core has a worker of its own. Processes that tests start inherit it.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

from collections.abc import Iterator  # noqa: E402 (the threads come first)
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from traj_ood.data import contents  # noqa: E402

torch.set_num_threads(1)

NOT_RUN = "slow: runs in make test-all"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the tests that are marked as slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason=NOT_RUN))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = sum(NOT_RUN in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if count:
        terminalreporter.line(f"{count} slow tests were not run: make test-all")


@pytest.fixture(scope="session", autouse=True)
def own_hashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what this machine remembers of files; ``$TRAJ_OOD_DATA`` still says where it is."""
    folder = tmp_path_factory.mktemp("hashes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contents, "cache_folder", lambda: Path(os.environ.get("TRAJ_OOD_DATA") or folder))
        yield
