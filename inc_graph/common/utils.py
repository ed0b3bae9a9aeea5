"""What own methods need of the common parts, under the name that scripts know."""

from inc_graph.common.logger import Logger, TuningLogger, dump_elapsed_time, log_process, logger
from inc_graph.common.mode import Mode
from inc_graph.common.options import set_random_seed, set_resume_from, set_tensorboard, set_workspace
from inc_graph.utils.cpu import CpuInfo, cpu_info
from inc_graph.utils.processor import ProcessorType, detect_processor_type_based_on_hw
from inc_graph.utils.statistics import Statistics

__all__ = [
    "CpuInfo",
    "Logger",
    "Mode",
    "ProcessorType",
    "Statistics",
    "TuningLogger",
    "cpu_info",
    "detect_processor_type_based_on_hw",
    "dump_elapsed_time",
    "log_process",
    "logger",
    "set_random_seed",
    "set_resume_from",
    "set_tensorboard",
    "set_workspace",
]
