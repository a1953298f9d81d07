"""Functions: arrays or variables in, a variable out."""

from chainer_deform.functions.deformable_convolution_2d_sampler import (
    deformable_convolution_2d_sampler,
)
from chainer_deform.functions.sampled_sum_2d import sampled_sum_2d

__all__ = ['deformable_convolution_2d_sampler', 'sampled_sum_2d']
