"""Does a stream of judged images still look like the calibration? Rates, tests and an alarm that holds at any time."""

from traj_ood.monitor.martingale import BETS, capitals, online_p_values
from traj_ood.monitor.rows import Rows, read_rows
from traj_ood.monitor.watch import Alarm, Finding, watch

__all__ = ["BETS", "Alarm", "Finding", "Rows", "capitals", "online_p_values", "read_rows", "watch"]
