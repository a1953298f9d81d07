"""Links: layers that hold the parameters of the functions."""

from chainer_deform.links.dcn_v3 import DCNv3
from chainer_deform.links.dcn_v4 import DCNv4
from chainer_deform.links.deformable_convolution_2d import (
    DeformableConvolution2D,
    DeformableConvolution2DSampler,
)
from chainer_deform.links.deformable_roi_pooling_2d import (
    DeformablePSRoIPooling2D,
    DeformableRoIPooling2D,
)
from chainer_deform.links.multi_scale_deformable_attention import (
    MultiScaleDeformableAttention,
)

__all__ = [
    'DCNv3',
    'DCNv4',
    'DeformableConvolution2D',
    'DeformableConvolution2DSampler',
    'DeformablePSRoIPooling2D',
    'DeformableRoIPooling2D',
    'MultiScaleDeformableAttention',
]
