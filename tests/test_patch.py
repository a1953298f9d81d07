import sys

import chainer.functions as F
import chainer.links as L
import pytest

import chainer_deform

originals = F.deformable_convolution_2d_sampler, L.DeformableConvolution2D


def places(*objects):
    """Where Chainer holds one of the objects: pairs of module and name."""
    return {
        (module_name, name)
        for module_name, module in list(sys.modules.items())
        if module_name.split('.')[0] in ('chainer', 'chainermn', 'onnx_chainer')
        for name, value in vars(module).items()
        if any(value is object_ for object_ in objects)
    }


@pytest.fixture(autouse=True)
def chainers_own():
    yield
    chainer_deform.unpatch_chainer()


def test_every_place_is_replaced_and_put_back():
    sampler_link = sys.modules[L.DeformableConvolution2D.__module__]
    chainers = (*originals, sampler_link.DeformableConvolution2DSampler)
    ours = (
        chainer_deform.functions.deformable_convolution_2d_sampler,
        chainer_deform.links.DeformableConvolution2D,
        chainer_deform.links.DeformableConvolution2DSampler,
    )
    before = places(*chainers)
    assert len(before) == 6
    assert not places(*ours)
    for _ in range(2):
        chainer_deform.patch_chainer()
        assert places(*ours) == before
        assert not places(*chainers)
    for _ in range(2):
        chainer_deform.unpatch_chainer()
        assert places(*chainers) == before
        assert not places(*ours)


def test_models_built_after_the_patch_are_ours():
    chainer_deform.patch_chainer()
    layer = L.DeformableConvolution2D(3, 4, ksize=(3, 2), pad=1, offset_nobias=True)
    assert isinstance(layer, chainer_deform.links.DeformableConvolution2D)
    chainer_deform.unpatch_chainer()
    assert originals == (F.deformable_convolution_2d_sampler, L.DeformableConvolution2D)
