"""Functions: arrays or variables in, a variable out."""

from chainer_deform.functions.deformable_convolution_2d_sampler import (
    deformable_convolution_2d_sampler,
)

__all__ = ['deformable_convolution_2d_sampler']
