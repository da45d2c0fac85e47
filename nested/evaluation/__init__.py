"""Measures of a generative model: distances of features, CLIP score, nearest neighbours and memorisation.

Everything here takes arrays, records and a generator, and no config; nested/modes/evaluate.py makes these from one.
The package may import nested.sampling, encoders, spaces, diffusion, figures, weights and runtime, and input_pipeline.
"""

from nested.evaluation.frechet import Statistics, fit_statistics, frechet_distance, load_statistics, statistics_distance
from nested.evaluation.kernel import KernelDistance, kernel_distance
from nested.evaluation.nearest import NearestStream, knn_accuracy, nearest_neighbors

__all__ = [
    "KernelDistance",
    "NearestStream",
    "Statistics",
    "fit_statistics",
    "frechet_distance",
    "kernel_distance",
    "knn_accuracy",
    "load_statistics",
    "nearest_neighbors",
    "statistics_distance",
]
