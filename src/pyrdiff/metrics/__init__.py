"""Measures of quality: of single images, and of sets of them. Every result says how it was computed."""

from .comparison import Score, SetComparison, interval_of, score_of_mean
from .distribution import (
    FeatureStatistics,
    KernelReference,
    bootstrap_interval,
    frechet_distance,
    kid,
    precision_recall,
)
from .features import Classifier, FeatureNetwork, ImageFeatures, open_features, train_classifier
from .fidelity import consistency, luma, psnr, ssim
from .loading import load
from .perceptual import LPIPS, lpips
from .result import MetricResult, combine

__all__ = [
    "LPIPS",
    "Classifier",
    "FeatureNetwork",
    "FeatureStatistics",
    "ImageFeatures",
    "KernelReference",
    "MetricResult",
    "Score",
    "SetComparison",
    "bootstrap_interval",
    "combine",
    "consistency",
    "frechet_distance",
    "interval_of",
    "kid",
    "load",
    "lpips",
    "luma",
    "open_features",
    "precision_recall",
    "psnr",
    "score_of_mean",
    "ssim",
    "train_classifier",
]
