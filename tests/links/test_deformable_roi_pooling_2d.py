import chainer
import chainer.functions as F
import numpy
import pytest
from chainer.utils.type_check import InvalidType

from chainer_deform.links import DeformablePSRoIPooling2D, DeformableRoIPooling2D
from chainer_deform.optimizer_hooks import scale_updates
from tests import reference
from tests.cases import assert_close
from tests.links.operators import (
    arrays_of,
    check_dtypes,
    check_every_parameter_learns,
    check_is_a_link,
    check_second_order,
    linear,
    randomize,
    sigmoid,
)

random = numpy.random.RandomState(0)
x = random.uniform(-1, 1, (3, 4, 7, 9)).astype('f')
maps = random.uniform(-1, 1, (3, 24, 7, 9)).astype('f')
features = random.uniform(-1, 1, (3, 5, 7, 9)).astype('f')
rois = numpy.array([[3, 5, 31, 40], [-4, 0, 12, 43], [10.5, 3.2, 20, 30.1]], 'f')
roi_indices = numpy.array([2, 0, 2], numpy.int32)


def make(in_channels=4, **options):
    options = {'sampling_ratio': (2, 1), 'fc_size': 6, **options}
    return DeformableRoIPooling2D(in_channels, (3, 2), 0.2, **options)


def make_ps(in_channels=24, **options):
    """Of 6 output channels, each half with offsets of its own."""
    options = {'classes': 2, 'part_size': (3, 2), 'sampling_ratio': 2, **options}
    return DeformablePSRoIPooling2D(in_channels, (4, 3), 0.2, 2, **options)


class TestPlain:
    @pytest.mark.parametrize(
        'options',
        [
            {},
            {'modulated': True},
            {'gamma': 0.7, 'aligned': False, 'sampling_ratio': None},
        ],
    )
    def test_composition(self, options):
        layer = randomize(make(**options), scale=1.0)
        parameters = arrays_of(layer)

        def pool(offset):
            sizes = (3, 2), 0.2, layer.sampling_ratio
            return reference.deformable_roi_average_align_2d(
                x,
                rois,
                roi_indices,
                offset,
                *sizes,
                gamma=layer.gamma,
                aligned=layer.aligned,
            )

        contents = pool(numpy.zeros((3, 2, 3, 2))).reshape(3, -1)
        hidden = numpy.maximum(linear(contents, parameters, 'offset_fc/0'), 0)
        hidden = numpy.maximum(linear(hidden, parameters, 'offset_fc/1'), 0)
        offset = linear(hidden, parameters, 'offset_fc/2').reshape(3, 2, 3, 2)
        assert abs(offset).max() > 0.5
        expected = pool(offset)
        if layer.modulated:
            hidden = numpy.maximum(linear(contents, parameters, 'mask_fc/0'), 0)
            mask = sigmoid(linear(hidden, parameters, 'mask_fc/1'))
            expected *= mask.reshape(3, 1, 3, 2)
        assert_close(layer(x, rois, roi_indices).array, expected, 'y')

    def test_begins_as_ordinary_pooling(self):
        expected = F.roi_average_align_2d(x, rois, roi_indices, (3, 2), 0.2, (2, 1))
        for modulated, share in (False, 1), (True, 0.5):
            layer = make(aligned=False, modulated=modulated)
            y = layer(x, rois, roi_indices)
            assert_close(y.array, share * expected.array, 'y')

    def test_offsets_learn_from_the_first_step(self):
        layer = make(modulated=True)
        layer.cleargrads()
        F.sum(layer(x, rois, roi_indices) ** 2).backward()
        for fc in layer.offset_fc[2], layer.mask_fc[1]:
            assert not fc.W.array.any()
            assert abs(fc.W.grad).max() > 1e-4

    def test_no_boxes(self):
        for in_channels in 4, None:
            layer = make(in_channels, modulated=True)
            y = layer(x, rois[:0], roi_indices[:0])
            assert y.shape == (0, 4, 3, 2)
            F.sum(y).backward()
            assert layer.offset_fc[0].W.shape == (6, 24)
            assert layer(x[:0], rois[:0], roi_indices[:0]).shape == y.shape

    @pytest.mark.parametrize(
        ('arguments', 'error', 'message'),
        [
            ((x[:, :3], rois, roi_indices), InvalidType, r'x\.shape == \(n, 4, h, w\)'),
            ((x[0], rois, roi_indices), InvalidType, r'x\.shape == \(n, 4, h, w\)'),
            ((x.tolist(), rois, roi_indices), TypeError, 'x must be a Variable or'),
            ((x, rois.tolist(), roi_indices), TypeError, 'rois must be a Variable or'),
            ((x, rois[:, 1:], roi_indices), InvalidType, r'rois\.shape == \(R, 4\)'),
            ((x, numpy.array(1.0), roi_indices), InvalidType, r'rois\.shape == \(R, 4'),
            ((x, rois, roi_indices[1:]), InvalidType, r'roi_indices\.shape == \(3,\)'),
            ((x, rois, roi_indices + 1), ValueError, 'roi_indices must be from 0 to 2'),
        ],
    )
    @pytest.mark.parametrize('in_channels', [4, None])
    def test_arguments(self, in_channels, arguments, error, message):
        layer = make(in_channels)
        layer(x, rois, roi_indices)  # which fixes the number of channels
        with pytest.raises(error, match=message):
            layer(*arguments)

    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            ({'in_channels': 0}, ValueError, 'in_channels must be at least 1'),
            ({'outsize': 0}, ValueError, 'outsize must be at least 1'),
            ({'spatial_scale': 0}, ValueError, 'spatial_scale must be above 0'),
            ({'sampling_ratio': 0}, ValueError, 'sampling_ratio must be at least 1'),
            ({'modulated': 1}, TypeError, 'modulated must be True or False'),
            ({'fc_size': 2.5}, TypeError, 'fc_size must be an int'),
            ({'gamma': numpy.nan}, ValueError, 'gamma must be finite'),
            ({'aligned': None}, TypeError, 'aligned must be True or False'),
        ],
    )
    def test_options(self, options, error, message):
        options = {'in_channels': 4, 'outsize': 2, 'spatial_scale': 1.0, **options}
        with pytest.raises(error, match='^' + message):
            DeformableRoIPooling2D(**options)

    def test_describes_itself(self):
        assert repr(make(modulated=True)) == (
            'DeformableRoIPooling2D(in_channels=4, outsize=(3, 2), spatial_scale=0.2, '
            'sampling_ratio=(2, 1), modulated=True, fc_size=6, gamma=0.1, aligned=True)'
        )

    def test_learning_rate_of_the_offsets(self):
        moved = {}
        for factor in 1, 0.01:
            layer = randomize(make(modulated=True))
            before = arrays_of(layer)
            optimizer = chainer.optimizers.SGD(0.1).setup(layer)
            scale_updates(layer.offset_fc, factor)
            optimizer.update(lambda layer=layer: F.sum(layer(x, rois, roi_indices)))
            moved[factor] = {k: a - before[k] for k, a in arrays_of(layer).items()}
        for name, step in moved[1].items():
            factor = 0.01 if name.startswith('offset_fc') else 1
            numpy.testing.assert_allclose(moved[0.01][name], factor * step, atol=1e-7)


class TestPositionSensitive:
    @pytest.mark.parametrize('options', [{}, {'part_size': None, 'gamma': 0.6}])
    @pytest.mark.parametrize('given', [False, True])
    def test_composition(self, options, given):
        source = features if given else maps
        options = {**options, 'offset_in_channels': 5} if given else options
        layer = randomize(make_ps(**options), scale=0.5)
        parts = layer.part_size or (4, 3)

        def pool(images, offset, outsize, part_size):
            return reference.deformable_ps_roi_average_pooling_2d(
                images,
                rois,
                roi_indices,
                offset,
                outsize,
                0.2,
                2,
                part_size=part_size,
                sampling_ratio=2,
                gamma=layer.gamma,
            )

        fields = linear(source.transpose(0, 2, 3, 1), arrays_of(layer), 'offset_conv')
        offset = pool(fields.transpose(0, 3, 1, 2), None, parts, None)
        assert offset.shape == (3, 4, *parts)
        expected = pool(maps, offset, (4, 3), parts)
        y = layer(maps, rois, roi_indices, *([features] if given else []))
        assert_close(y.array, expected, 'y')

    def test_begins_without_offsets(self):
        layer = make_ps()
        expected = randomize(make_ps(gamma=0), scale=9.0)(maps, rois, roi_indices).array
        assert_close(layer(maps, rois, roi_indices).array, expected, 'y')
        layer.cleargrads()
        F.sum(layer(maps, rois, roi_indices) ** 2).backward()
        assert abs(layer.offset_conv.W.grad).max() > 1e-4

    def test_no_boxes(self):
        y = make_ps(None)(maps, rois[:0], roi_indices[:0])
        assert y.shape == (0, 6, 4, 3)
        F.sum(y).backward()

    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            ({'group_size': 0}, ValueError, 'group_size must be at least 1'),
            ({'part_size': (1, 0)}, ValueError, 'part_size must be at least 1'),
            ({'sampling_ratio': None}, TypeError, 'sampling_ratio must be an int or'),
            ({'classes': 0}, ValueError, 'classes must be at least 1'),
            ({'classes': 4}, ValueError, r'in_channels must .* == 16, not 24'),
            ({'in_channels': 25}, ValueError, r'in_channels must .* == 4, not 25'),
            ({'offset_in_channels': 0}, ValueError, 'offset_in_channels must be at'),
            ({'gamma': '1'}, TypeError, 'gamma must be a number'),
        ],
    )
    def test_options(self, options, error, message):
        needed = {'in_channels': 24, 'outsize': 2, 'spatial_scale': 1, 'group_size': 2}
        with pytest.raises(error, match='^' + message):
            DeformablePSRoIPooling2D(**{**needed, **options})

    def test_arguments(self):
        layer = make_ps(offset_in_channels=5)
        with pytest.raises(InvalidType, match=r'x\.shape == \(n, 24, h, w\)'):
            layer(x, rois, roi_indices, features)
        with pytest.raises(InvalidType, match=r'offset_input\.shape == \(3, 5, 7, 9\)'):
            layer(maps, rois, roi_indices, features[:, :, 1:])


MAKERS = {
    'plain': (make, (x, rois, roi_indices)),
    'modulated': (
        lambda in_channels=4: make(in_channels, modulated=True),
        (x, rois, roi_indices),
    ),
    'position-sensitive': (make_ps, (maps, rois, roi_indices)),
}
every_form = pytest.mark.parametrize('form', MAKERS)


@every_form
def test_is_a_link(form, tmp_path):
    check_is_a_link(*MAKERS[form], tmp_path)


@every_form
def test_dtypes(form):
    # Boxes in float16 are off by up to 0.01 pixels, as offsets are.
    check_dtypes(*MAKERS[form])


@every_form
def test_every_parameter_learns(form):
    check_every_parameter_learns(*MAKERS[form])


@every_form
def test_second_order(form):
    check_second_order(*MAKERS[form], count=1)
