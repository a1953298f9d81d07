"""Functions: arrays or variables in, a variable out."""

from chainer_deform.functions.dcn_v3_2d import dcn_v3_2d
from chainer_deform.functions.deformable_convolution_2d_sampler import (
    deformable_convolution_2d_sampler,
)
from chainer_deform.functions.deformable_ps_roi_average_pooling_2d import (
    deformable_ps_roi_average_pooling_2d,
)
from chainer_deform.functions.deformable_roi_average_align_2d import (
    deformable_roi_average_align_2d,
)
from chainer_deform.functions.multi_scale_deformable_attention import (
    multi_scale_deformable_attention,
)
from chainer_deform.functions.sampled_sum_2d import sampled_sum_2d

__all__ = [
    'dcn_v3_2d',
    'deformable_convolution_2d_sampler',
    'deformable_ps_roi_average_pooling_2d',
    'deformable_roi_average_align_2d',
    'multi_scale_deformable_attention',
    'sampled_sum_2d',
]
