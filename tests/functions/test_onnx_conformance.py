"""The cases that the ONNX standard comes with, for its operator DeformConv."""

import importlib
import warnings

import chainer
import numpy
import pytest

from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.onnx_export import export

onnx = pytest.importorskip('onnx', '1.14', 'onnx has DeformConv from 1.14 on')
reference = pytest.importorskip('onnx.reference')


@pytest.fixture(scope='module')
def cases():
    """By name: the node, its inputs by name, its output."""
    found = {}

    def expect(node, inputs, outputs, name):
        inputs = iter(inputs)  # none for an input that is left out
        given = zip(('X', 'W', 'offset', 'B', 'mask'), node.input)
        arrays = {argument: next(inputs) for argument, given_as in given if given_as}
        found[name] = node, arrays, outputs[0]

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as monkeypatch:
        warnings.simplefilter('ignore')  # onnx's own tests, with NumPy's newest
        module = importlib.import_module('onnx.backend.test.case.node.deformconv')
        monkeypatch.setattr(module, 'expect', expect)
        for name in dir(module.DeformConv):
            if name.startswith('export'):
                getattr(module.DeformConv, name)()
    return found


class Model(chainer.Chain):
    """The function with the attributes of a node."""

    def __init__(self, node):
        super().__init__()
        attributes = {
            attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in node.attribute
        }
        attributes.pop('kernel_shape')
        top, left, bottom, right = attributes.pop('pads', (0, 0, 0, 0))
        assert (top, left) == (bottom, right)
        self.options = {
            'pad': (top, left),
            'stride': tuple(attributes.pop('strides', (1, 1))),
            'dilate': tuple(attributes.pop('dilations', (1, 1))),
            'groups': attributes.pop('group', 1),
            'offset_groups': attributes.pop('offset_group', 1),
        }
        assert not attributes

    def forward(self, X, W, offset, B=None, mask=None):
        return deformable_convolution_2d_sampler(
            X, offset, W, B, mask=mask, **self.options
        )


@pytest.mark.parametrize('how', ['called', 'exported'])
@pytest.mark.parametrize(
    'name',
    [
        'test_basic_deform_conv_with_padding',
        'test_basic_deform_conv_without_padding',
        'test_deform_conv_with_mask_bias',
        'test_deform_conv_with_multiple_offset_groups',
    ],
)
def test_conformance(cases, name, how):
    node, arrays, expected = cases[name]
    model = Model(node)
    groups = model.options['offset_groups']
    n, channels, *out_size = arrays['offset'].shape
    # (..., tap, y or x) -> (..., x or y, tap)
    pairs = arrays['offset'].reshape(n, groups, channels // groups // 2, 2, *out_size)
    offset = pairs[:, :, :, ::-1].swapaxes(2, 3).reshape(arrays['offset'].shape)
    arrays = {**arrays, 'offset': offset}
    if how == 'called':
        actual = model(**arrays).array
    else:
        names = {name: name for name in arrays}
        exported = export(model, arrays, input_names=names)
        evaluator = reference.ReferenceEvaluator(exported)
        (actual,) = evaluator.run(None, arrays)
    assert actual.dtype == expected.dtype
    numpy.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_no_case_is_left_out(cases):
    assert len(cases) == 4
