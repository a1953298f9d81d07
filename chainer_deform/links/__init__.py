"""Links: layers that hold the parameters of the functions."""

from chainer_deform.links.deformable_convolution_2d import (
    DeformableConvolution2D,
    DeformableConvolution2DSampler,
)

__all__ = ['DeformableConvolution2D', 'DeformableConvolution2DSampler']
