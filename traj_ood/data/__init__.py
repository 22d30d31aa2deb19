"""Images with stable ids, their preprocessing, and benchmarks of named splits."""

from traj_ood.data.benchmark import OOD_ROLES, Benchmark, OODRole, Role, Split
from traj_ood.data.decoding import Reading
from traj_ood.data.images import ArrayImages, FileImages, ImageSource, read_folder, read_image_list
from traj_ood.data.preflight import MissingDataError, preflight
from traj_ood.data.registry import BenchmarkInfo, list_benchmarks, load_benchmark, register_benchmark

__all__ = [
    "OOD_ROLES",
    "ArrayImages",
    "Benchmark",
    "BenchmarkInfo",
    "FileImages",
    "ImageSource",
    "MissingDataError",
    "OODRole",
    "Reading",
    "Role",
    "Split",
    "list_benchmarks",
    "load_benchmark",
    "preflight",
    "read_folder",
    "read_image_list",
    "register_benchmark",
]
