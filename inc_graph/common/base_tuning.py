"""What `autotune` tries, and when it stops, under the name that scripts know."""

from inc_graph.quantization.tuning_config import (
    ConfigLoader,
    ConfigSet,
    Evaluator,
    Sampler,
    SequentialSampler,
    TuningConfig,
    default_sampler,
)

__all__ = ["ConfigLoader", "ConfigSet", "Evaluator", "Sampler", "SequentialSampler", "TuningConfig", "default_sampler"]
