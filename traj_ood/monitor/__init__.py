"""Monitor whether a stream of judged images still resembles the calibration images: rates, tests and alarms."""

from traj_ood.monitor.martingale import BETS, capitals, online_p_values
from traj_ood.monitor.rows import Rows, read_rows
from traj_ood.monitor.watch import Alarm, StreamState, watch

__all__ = ["BETS", "Alarm", "Rows", "StreamState", "capitals", "online_p_values", "read_rows", "watch"]
