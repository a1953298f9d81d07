"""Trainer extensions: what the deformable layers do while a model is trained."""

from chainer_deform.extensions.offset_statistics import OffsetStatistics
from chainer_deform.extensions.sampling_points_report import SamplingPointsReport

__all__ = ['OffsetStatistics', 'SamplingPointsReport']
