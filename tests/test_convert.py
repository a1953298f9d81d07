"""Conversion, compared with torchvision in a process of its own where there is one."""

import os
import pathlib
import re
import subprocess
import textwrap

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer.utils import type_check

from chainer_deform.convert import (
    from_mmcv,
    from_torchvision,
    offset_from_interleaved,
    offset_to_interleaved,
    to_mmcv,
    to_torchvision,
)
from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler
from tests import torchvision_process
from tests.processes import run_with_torch
from tests.torchvision_process import CASES

normal = chainer.initializers.Normal(0.3)


def interleaved(array, offset_groups):
    """The channels of axis 0 in the other order, one by one."""
    array = numpy.asarray(array)
    taps = len(array) // offset_groups // 2
    result = numpy.empty_like(array)
    for group in range(offset_groups):
        for k in range(taps):
            start = group * 2 * taps
            result[start + 2 * k] = array[start + taps + k]  # y
            result[start + 2 * k + 1] = array[start + k]  # x
    return result


def make_layer(in_channels=6, **options):
    """An asymmetric layer, none of whose parameters is zero."""
    layer = DeformableConvolution2D(
        in_channels,
        4,
        (3, 2),
        **{
            'stride': (2, 1),
            'pad': (1, 0),
            'dilate': (2, 1),
            'groups': 2,
            'offset_groups': 3,
            'modulated': True,
            'offset_initialW': normal,
            'offset_initial_bias': normal,
            'deform_initialW': normal,
            'deform_initial_bias': normal,
            **options,
        },
    )
    return layer


def make_sampler(in_channels=6, **options):
    options = {'groups': 2, 'offset_groups': 3, 'initial_bias': normal, **options}
    return DeformableConvolution2DSampler(in_channels, 4, (3, 2), **options)


def arrays_of(link):
    """Copies of all parameters; ``None`` for those that are not initialised."""
    return {
        name: None if param.array is None else param.array.copy()
        for name, param in link.namedparams()
    }


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert (array is None) == (others[name] is None)
        if array is not None:
            assert array.dtype == others[name].dtype
            numpy.testing.assert_array_equal(array, others[name], name)


def torchvision_state(random, offset_channels=54, mask_channels=0):
    """What a module with the options of ``make_layer`` has."""
    shapes = {
        'offset_conv.weight': (offset_channels, 6, 3, 2),
        'offset_conv.bias': (offset_channels,),
        'deform_conv.weight': (4, 3, 3, 2),
        'deform_conv.bias': (4,),
    }
    if mask_channels:
        shapes['mask_conv.weight'] = mask_channels, 6, 3, 2
        shapes['mask_conv.bias'] = (mask_channels,)
    return {key: random.standard_normal(shape) for key, shape in shapes.items()}


def mmcv_state(random):
    state = torchvision_state(random)
    names = {'offset_conv': 'conv_offset.', 'deform_conv': ''}
    return {
        names[key.split('.')[0]] + key.split('.')[1]: array
        for key, array in state.items()
    }


@pytest.fixture
def random():
    return numpy.random.RandomState(0)


class TestOffsets:
    def test_order(self):
        # x0, x1, x2, y0, y1, y2 of two groups
        offset = numpy.array(
            [10, 11, 12, 20, 21, 22, 30, 31, 32, 40, 41, 42], numpy.float32
        )
        expected = [20, 10, 21, 11, 22, 12, 40, 30, 41, 31, 42, 32]
        result = offset_to_interleaved(offset, 2, axis=0)
        assert result.dtype == numpy.float32
        assert result.tolist() == expected
        assert interleaved(offset, 2).tolist() == expected

    @pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
    @pytest.mark.parametrize(
        ('axis', 'shape'),
        [
            (0, (24,)),
            (0, (24, 3, 2, 5)),
            (1, (2, 24, 3, 5)),
            (2, (1, 3, 24)),
            (1, (0, 24, 3, 5)),
        ],
    )
    def test_like_one_by_one_and_back(self, random, axis, shape, dtype):
        offset = random.standard_normal(shape).astype(dtype)
        before = offset.copy()
        there = offset_to_interleaved(offset, 2, axis)
        expected = interleaved(offset.swapaxes(0, axis), 2).swapaxes(0, axis)
        numpy.testing.assert_array_equal(there, expected)
        back = offset_from_interleaved(there, 2, axis)
        numpy.testing.assert_array_equal(back, offset)
        assert there.dtype == back.dtype == offset.dtype
        there[...] = back[...] = 7
        numpy.testing.assert_array_equal(offset, before)

    def test_of_one_tap_is_a_copy(self):
        offset = numpy.array([[1.0, 2.0]])
        result = offset_to_interleaved(offset)
        assert result.tolist() == [[2, 1]]
        assert not numpy.shares_memory(result, offset)

    @pytest.mark.parametrize(
        'convert', [offset_to_interleaved, offset_from_interleaved]
    )
    def test_variables_pass_gradients(self, random, convert):
        offset = chainer.Variable(random.standard_normal((2, 12, 3, 4)))
        weight = random.standard_normal((2, 12, 3, 4))
        y = convert(offset, 3)
        assert isinstance(y, chainer.Variable)
        numpy.testing.assert_array_equal(y.array, convert(offset.array, 3))
        (g,) = chainer.grad(
            [F.sum(y**2 * weight)], [offset], enable_double_backprop=True
        )
        back = {
            offset_to_interleaved: offset_from_interleaved,
            offset_from_interleaved: offset_to_interleaved,
        }[convert](weight, 3)
        numpy.testing.assert_allclose(g.array, 2 * offset.array * back)
        (gg,) = chainer.grad([F.sum(g)], [offset])
        numpy.testing.assert_allclose(gg.array, 2 * back)

    @pytest.mark.parametrize(
        'convert', [offset_to_interleaved, offset_from_interleaved]
    )
    @pytest.mark.parametrize(
        ('arguments', 'error', 'message'),
        [
            (([1.0, 2.0],), TypeError, 'offset must be .* not a list'),
            ((numpy.zeros((1, 2), int),), type_check.InvalidType, 'offset.dtype'),
            (
                (numpy.zeros((1, 10, 3, 3)), 3),
                type_check.InvalidType,
                r'(?s)offset.shape\[1\] is a multiple of .* 6.*\(1, 10, 3, 3\)',
            ),
            ((numpy.zeros(6), 3), type_check.InvalidType, r'offset.shape\[1\]'),
            ((numpy.zeros((1, 6)), 0), ValueError, 'offset_groups must be at least 1'),
            ((numpy.zeros((1, 6)), 1.0), TypeError, 'offset_groups must be an int'),
            ((numpy.zeros((1, 6)), 1, -1), ValueError, 'axis must be at least 0'),
            ((numpy.zeros((1, 6)), 1, None), TypeError, 'axis must be an int'),
        ],
    )
    def test_errors(self, convert, arguments, error, message):
        with pytest.raises(error, match=message):
            convert(*arguments)


class TestTorchvision:
    def test_every_array_goes_to_its_place(self, random):
        layer = make_layer()
        state = torchvision_state(random)
        from_torchvision(layer, state)
        offset, deform = layer.offset_conv, layer.deform_conv
        for found, expected in (
            (interleaved(offset.W.array[:36], 3), state['offset_conv.weight'][:36]),
            (offset.W.array[36:], state['offset_conv.weight'][36:]),
            (interleaved(offset.b.array[:36], 3), state['offset_conv.bias'][:36]),
            (offset.b.array[36:], state['offset_conv.bias'][36:]),
            (deform.W.array, state['deform_conv.weight']),
            (deform.b.array, state['deform_conv.bias']),
        ):
            numpy.testing.assert_array_equal(found, expected.astype('float32'))

    def test_mask_conv(self, random):
        layer, other = make_layer(), make_layer()
        state = torchvision_state(random, 36, 18)
        from_torchvision(layer, state, mask_conv='mask_conv')
        for name in 'weight', 'bias':
            state[f'offset_conv.{name}'] = numpy.concatenate(
                [state[f'offset_conv.{name}'], state.pop(f'mask_conv.{name}')]
            )
        from_torchvision(other, state)
        assert_same(arrays_of(layer), arrays_of(other))

    def test_not_modulated(self, random):
        layer = make_layer(modulated=False)
        state = torchvision_state(random, 36)
        from_torchvision(layer, state)
        assert_same(to_torchvision(layer), as_dtype(state, 'float32'))

    def test_names(self, random):
        layer = make_layer()
        state = torchvision_state(random, 36, 18)
        names = {'offset_conv': 'a', 'mask_conv': 'b', 'deform_conv': 'c.d'}
        renamed = {
            f'{names[key.split(".")[0]]}.{key.split(".")[1]}': array
            for key, array in state.items()
        }
        from_torchvision(layer, renamed, **names)
        assert_same(to_torchvision(layer, **names), as_dtype(renamed, 'float32'))
        assert_same(
            to_torchvision(layer, mask_conv='mask_conv'), as_dtype(state, 'float32')
        )

    def test_module_that_is_a_deform_conv_itself(self, random):
        layer, other = make_layer(), make_layer()
        state = mmcv_state(random)
        from_torchvision(layer, state, offset_conv='conv_offset', deform_conv='')
        from_mmcv(other, state)
        assert_same(arrays_of(layer), arrays_of(other))

    def test_sampler(self, random):
        sampler = make_sampler()
        state = {
            'weight': random.standard_normal((4, 3, 3, 2)).astype('f'),
            'bias': random.standard_normal(4).astype('f'),
        }
        from_torchvision(sampler, state)
        assert_same(to_torchvision(sampler), state)
        numpy.testing.assert_array_equal(sampler.W.array, state['weight'])
        numpy.testing.assert_array_equal(sampler.b.array, state['bias'])


class TestMmcv:
    def test_every_array_goes_to_its_place(self, random):
        layer, other = make_layer(), make_layer()
        state = mmcv_state(random)
        from_mmcv(layer, state)
        from_torchvision(
            other,
            {
                'offset_conv.weight': state['conv_offset.weight'],
                'offset_conv.bias': state['conv_offset.bias'],
                'deform_conv.weight': state['weight'],
                'deform_conv.bias': state['bias'],
            },
        )
        assert_same(arrays_of(layer), arrays_of(other))
        assert_same(to_mmcv(layer), as_dtype(state, 'float32'))

    def test_mask_scale_is_folded_into_the_filter(self, random):
        plain, scaled = make_layer(), make_layer(mask_scale=numpy.float64(3))
        state = mmcv_state(random)
        from_mmcv(plain, state)
        from_mmcv(scaled, state)
        numpy.testing.assert_allclose(
            scaled.deform_conv.W.array, state['weight'] / 3, rtol=1e-6
        )
        x = random.standard_normal((2, 6, 9, 8)).astype('f')
        y = plain(x).array
        numpy.testing.assert_allclose(scaled(x).array, y, atol=1e-5)
        back = to_mmcv(scaled)
        assert {array.dtype for array in back.values()} == {numpy.dtype('float32')}
        for key, array in back.items():
            numpy.testing.assert_allclose(array, state[key], rtol=1e-6)

    def test_mask_scale_of_2_is_exact(self):
        layer, other = make_layer(mask_scale=2), make_layer(mask_scale=2)
        from_mmcv(other, to_mmcv(layer))
        assert_same(arrays_of(other), arrays_of(layer))

    def test_mask_scale_of_a_layer_without_mask_counts_for_nothing(self):
        options = {'modulated': False, 'mask_scale': 5, 'deform_nobias': True}
        layer = make_layer(**options)
        numpy.testing.assert_array_equal(
            to_mmcv(layer)['weight'], layer.deform_conv.W.array
        )

    def test_mask_scale_of_0(self, random):
        layer = make_layer(mask_scale=0)
        before = arrays_of(layer)
        with pytest.raises(ValueError, match='mask_scale must not be 0'):
            from_mmcv(layer, mmcv_state(random))
        assert_same(arrays_of(layer), before)

    def test_offset_convolution_without_bias_gets_one_of_zeros(self, random):
        layer, other = make_layer(offset_nobias=True), make_layer()
        state = to_mmcv(layer)
        assert state['conv_offset.bias'].dtype == numpy.float32
        from_mmcv(other, state)
        x = random.standard_normal((2, 6, 9, 8)).astype('f')
        numpy.testing.assert_array_equal(other(x).array, layer(x).array)

    def test_version_1_has_no_bias(self):
        with pytest.raises(ValueError, match='deform_nobias=True'):
            to_mmcv(make_layer(modulated=False))
        state = to_mmcv(make_layer(modulated=False, deform_nobias=True))
        assert sorted(state) == ['conv_offset.bias', 'conv_offset.weight', 'weight']

    def test_sampler(self):
        for options in {}, {'nobias': True}:
            sampler, other = make_sampler(**options), make_sampler(**options)
            state = to_mmcv(sampler)
            assert sorted(state) == ['weight'] if options else ['bias', 'weight']
            from_mmcv(other, state)
            assert_same(arrays_of(other), arrays_of(sampler))

    def test_early_files_have_the_offset_convolution_beside_the_layer(self, random):
        layer, other = make_layer(), make_layer()
        state = mmcv_state(random)
        from_mmcv(layer, state)
        early = {
            'conv1.weight': numpy.zeros(3),
            'conv2.weight': state['weight'],
            'conv2.bias': state['bias'],
            'conv2_offset.weight': state['conv_offset.weight'],
            'conv2_offset.bias': state['conv_offset.bias'],
        }
        from_mmcv(other, early, prefix='conv2.')
        assert_same(arrays_of(other), arrays_of(layer))
        del early['conv2_offset.bias']
        with pytest.raises(ValueError, match="lacks 'conv2_offset.bias'"):
            from_mmcv(other, early, prefix='conv2.')

    def test_block_of_detectron2(self, random):
        layer = make_layer(deform_nobias=True)
        other = make_layer(None, deform_nobias=True)
        state = mmcv_state(random)
        del state['bias']
        from_mmcv(layer, state)
        block = {
            'res4.0.conv2.weight': state['weight'],
            'res4.0.conv2_offset.weight': state['conv_offset.weight'],
            'res4.0.conv2_offset.bias': state['conv_offset.bias'],
        }
        for conv in 'conv1', 'conv2', 'conv3':
            for name in 'weight', 'bias', 'running_mean', 'running_var':
                block[f'res4.0.{conv}.norm.{name}'] = random.standard_normal(4)
        block['res4.0.conv1.weight'] = random.standard_normal((6, 8, 1, 1))
        block['res4.0.conv3.weight'] = random.standard_normal((8, 4, 1, 1))
        from_mmcv(other, block, prefix='res4.0.conv2.')
        assert_same(arrays_of(other), arrays_of(layer))
        before = arrays_of(other)
        for prefix in '', 'res4.', 'res4.0.':
            message = f"prefix must be that of a layer, 'res4.0.conv2.', not '{prefix}'"
            with pytest.raises(ValueError, match=message):
                from_mmcv(other, block, prefix=prefix)
        # Only a norm is left alone.
        block['res4.0.conv2.normal'] = numpy.zeros(3)
        with pytest.raises(ValueError, match="has 'res4.0.conv2.normal' besides$"):
            from_mmcv(other, block, prefix='res4.0.conv2.')
        assert_same(arrays_of(other), before)

    def test_layer_of_centernet(self, random):
        layer, other = make_layer(), make_layer()
        state = mmcv_state(random)
        from_mmcv(layer, state)
        theirs = {
            f'up.proj_1.conv.{key.replace("offset", "offset_mask")}': array
            for key, array in state.items()
        }
        theirs['up.proj_1.actf.0.weight'] = numpy.zeros(4)
        from_mmcv(other, theirs, prefix='up.proj_1.conv.')
        assert_same(arrays_of(other), arrays_of(layer))
        del theirs['up.proj_1.conv.conv_offset_mask.bias']
        with pytest.raises(
            ValueError, match="lacks 'up.proj_1.conv.conv_offset_mask.b"
        ):
            from_mmcv(other, theirs, prefix='up.proj_1.conv.')
        with pytest.raises(ValueError, match="of a layer, 'up.proj_1.conv.', not ''"):
            from_mmcv(other, theirs)

    @pytest.mark.parametrize('mask_scale', [numpy.nan, numpy.inf, -numpy.inf])
    def test_mask_scale_that_is_not_finite(self, random, mask_scale):
        layer = make_layer(mask_scale=mask_scale)
        before = arrays_of(layer)
        with pytest.raises(ValueError, match=f'mask_scale must .* is {mask_scale}'):
            from_mmcv(layer, mmcv_state(random))
        assert_same(arrays_of(layer), before)

    def test_mask_scale_makes_a_number_too_large(self, random):
        state = mmcv_state(random)
        layer = make_layer(mask_scale=1e-39)
        before = arrays_of(layer)
        message = (
            r"dict\['weight'\] .* divided by mask_scale, 1e-39, .* deform_conv/W, f"
        )
        with pytest.raises(ValueError, match=message):
            from_mmcv(layer, state)
        assert_same(arrays_of(layer), before)
        layer.mask_scale = 1e39
        message = 'link has .* multiplied by mask_scale, 1e.39, is too large for deform'
        with pytest.raises(ValueError, match=message):
            to_mmcv(layer)

    def test_key_of_early_files_that_is_of_another_layer(self, random):
        """Beside a layer that has an offset convolution of its own."""
        layer, other = make_layer(), make_layer()
        state = mmcv_state(random)
        from_mmcv(layer, state)
        whole = {f'conv2.{key}': array for key, array in state.items()}
        whole['conv2_offset.weight'] = numpy.zeros((5, 4, 3, 2))
        whole['conv2_offset.bias'] = numpy.zeros(5)
        from_mmcv(other, whole, prefix='conv2.')
        assert_same(arrays_of(other), arrays_of(layer))


def as_dtype(arrays, dtype):
    return {name: array.astype(dtype) for name, array in arrays.items()}


from_and_to = pytest.mark.parametrize(
    ('load', 'save'),
    [(from_torchvision, to_torchvision), (from_mmcv, to_mmcv)],
    ids=['torchvision', 'mmcv'],
)


@from_and_to
class TestBoth:
    @pytest.mark.parametrize(
        'make',
        [
            make_layer,
            lambda **options: make_layer(deform_nobias=True, **options),
            lambda **options: make_layer(
                modulated=False, deform_nobias=True, **options
            ),
            make_sampler,
            lambda **options: make_sampler(nobias=True, **options),
        ],
    )
    def test_there_and_back(self, load, save, make):
        link = make()
        for prefix in '', 'layer4.0.':
            state = save(link, prefix=prefix)
            assert all(type(array) is numpy.ndarray for array in state.values())
            assert all(key.startswith(prefix) for key in state)
            for other in make(), make(in_channels=None):
                load(other, state, prefix=prefix)
                assert_same(arrays_of(other), arrays_of(link))

    def test_nothing_is_shared(self, load, save):
        link, other = make_layer(), make_layer()
        before = arrays_of(link)
        state = save(link)
        load(other, state)
        for array in state.values():
            array[...] = 7
        assert_same(arrays_of(link), before)
        assert_same(arrays_of(other), before)

    def test_parameters_stay_what_they_are(self, load, save):
        link = make_layer()
        optimizer = chainer.optimizers.MomentumSGD().setup(link)
        x = numpy.ones((1, 6, 9, 8), 'f')
        optimizer.update(lambda: F.sum(link(x)))
        params = list(link.params())
        rules = [param.update_rule for param in params]
        arrays = [param.array for param in params]
        grads = [param.grad.copy() for param in params]
        load(link, save(make_layer()))
        for param, rule, array, grad in zip(params, rules, arrays, grads):
            assert param.update_rule is rule
            assert param.array is array
            numpy.testing.assert_array_equal(param.grad, grad)
        optimizer.update(lambda: F.sum(link(x)))

    @pytest.mark.parametrize('in_channels', [6, None])
    def test_cast_to_the_links_dtype(self, load, save, in_channels):
        state = as_dtype(save(make_layer()), 'float64')
        for dtype in 'float16', 'float64':
            with chainer.using_config('dtype', numpy.dtype(dtype)):
                link = make_layer(in_channels)
                load(link, state)
                assert_same(save(link), as_dtype(state, dtype))
                assert {param.dtype for param in link.params()} == {numpy.dtype(dtype)}
                x = numpy.ones((1, 6, 9, 8), dtype)
                assert link(x).dtype == dtype

    def test_other_kinds_of_arrays(self, load, save):
        """All that NumPy can read, and in any memory order."""
        ones = {
            key: numpy.ones(array.shape, 'i1')
            for key, array in save(make_layer()).items()
        }
        for convert in (
            numpy.ndarray.tolist,
            numpy.asfortranarray,
            lambda array: array.astype('>f4'),
            lambda array: array.astype('u2'),
            memoryview,
        ):
            link = make_layer()
            load(link, {key: convert(array) for key, array in ones.items()})
            assert_same(save(link), as_dtype(ones, 'float32'))

    def test_archive(self, load, save, tmp_path):
        link, other = make_layer(), make_layer()
        numpy.savez(tmp_path / 'state.npz', **save(link))
        with numpy.load(tmp_path / 'state.npz') as archive:
            load(other, archive)
        assert_same(arrays_of(other), arrays_of(link))

    def test_only_one_part_is_initialised(self, load, save):
        link, other = make_layer(), make_layer(None)
        other.offset_conv.W.initialize((54, 6, 3, 2))
        load(other, save(link))
        assert_same(arrays_of(other), arrays_of(link))
        other = make_layer(None)
        other.offset_conv.W.initialize((54, 4, 3, 2))
        with pytest.raises(ValueError, match=r'must have the shape .*, not '):
            load(other, save(link))
        assert other.deform_conv.W.array is None

    def test_initialised_as_by_a_call(self, load, save):
        link = make_layer(None)
        link.cleargrads()
        load(link, save(make_layer()))
        x = numpy.ones((1, 6, 9, 8), 'f')
        F.sum(link(x)).backward()
        assert numpy.isfinite(link.deform_conv.W.grad).all()

    def test_others_of_a_whole_model_are_left_alone(self, load, save):
        link, other = make_layer(), make_layer()
        state = {
            **save(link, prefix='a.b.'),
            **save(other, prefix='a.c.'),
            'weight': None,
            'a.bc': 'no array',
            0: None,
        }
        load(other, state, prefix='a.b.')
        assert_same(arrays_of(other), arrays_of(link))


def drop(*names):
    """Leaves out what ends with one of the names."""
    return lambda state: {
        key: array for key, array in state.items() if not key.endswith(names)
    }


def drop_filter(state):
    return {
        key: array for key, array in state.items() if array.ndim != 4 or len(array) != 4
    }


def change(name, function):
    return lambda state: {
        key: function(array) if key.endswith(name) else array
        for key, array in state.items()
    }


class NotForNumPy:
    """As a tensor on a GPU."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError('not on this device')


class Broken(numpy.ndarray):
    """It cannot be written: some of it is, then there is an error."""

    error: BaseException

    def __setitem__(self, key, value):
        numpy.asarray(self).flat[0] = 99
        raise Broken.error


class Fails(chainer.initializer.Initializer):
    def __call__(self, array):
        raise ArithmeticError('initializer')


@from_and_to
class TestNothingIsChanged:
    """Whatever is wrong with the last part, none is written."""

    def test_read_only(self, load, save):
        state = save(make_layer())
        for name in 'offset_conv/W', 'offset_conv/b', 'deform_conv/W', 'deform_conv/b':
            link = make_layer()
            before = arrays_of(link)
            dict(link.namedparams())[f'/{name}'].array.flags.writeable = False
            with pytest.raises(ValueError, match=f'{name} of link must not be read-'):
                load(link, state)
            assert_same(arrays_of(link), before)
        sampler = make_sampler()
        sampler.b.array.flags.writeable = False
        with pytest.raises(ValueError, match='^b of link must not be read-only'):
            load(sampler, save(make_sampler()))

    @pytest.mark.parametrize('in_channels', [6, None])
    @pytest.mark.parametrize('errors', ['ignore', 'warn', 'raise'])
    @pytest.mark.parametrize(
        ('dtype', 'source', 'number'),
        [
            ('float16', 'float32', 65520),
            ('float16', 'int64', -70000),
            ('float32', 'float64', 1e39),
            ('float32', 'longdouble', 1e300),
        ],
    )
    def test_number_that_is_too_large(
        self, load, save, in_channels, errors, dtype, source, number
    ):
        good = as_dtype(save(make_layer()), source)
        largest = numpy.finfo(dtype).max
        with chainer.using_config('dtype', numpy.dtype(dtype)):
            link = make_layer(in_channels)
            before = arrays_of(link)
            for key, array in good.items():
                bad = array.copy()
                bad.flat[1] = number
                too_large = pytest.raises(ValueError, match='too large')
                with numpy.errstate(all=errors), too_large as caught:
                    load(link, {**good, key: bad})
                name = 'offset_conv/' if 'offset' in key else 'deform_conv/'
                name += 'W' if 'weight' in key else 'b'
                assert str(caught.value) == (
                    f'state_dict[{key!r}] has the number {bad.flat[1]}, which is too '
                    f'large for {name}, {dtype} (at most {largest})'
                )
                assert_same(arrays_of(link), before)
            array.flat[1] = largest
            load(link, good)

    def test_infinite_numbers_stay_what_they_are(self, load, save):
        with chainer.using_config('dtype', numpy.float16):
            link = make_layer()
        state = as_dtype(save(make_layer()), 'float64')
        for array in state.values():
            array.flat[:3] = numpy.nan, numpy.inf, -numpy.inf
        load(link, state)
        assert_same(save(link), as_dtype(state, 'float16'))

    @pytest.mark.parametrize('mask', [False, True, [True] + [False] * 3])
    def test_masked_array(self, load, save, mask):
        link, state = make_layer(), save(make_layer())
        before = arrays_of(link)
        (last,) = (key for key, array in state.items() if array.shape == (4,))
        state[last] = numpy.ma.masked_array(state[last], mask)
        with pytest.raises(
            TypeError, match=r'mask, not a MaskedArray: .*\.filled\(0\)'
        ):
            load(link, state)
        assert_same(arrays_of(link), before)

    @pytest.mark.parametrize('name', ['offset_conv/W', 'offset_conv/b'])
    @pytest.mark.parametrize('error', [ArithmeticError, KeyboardInterrupt])
    def test_copying_fails(self, load, save, name, error):
        for in_channels in 6, None:
            link, state = make_layer(in_channels), save(make_layer())
            if in_channels is None:
                link.offset_conv.W.initialize((54, 6, 3, 2))
            param = dict(link.namedparams())[f'/{name}']
            before, attributes = arrays_of(link), dict(vars(link.deform_conv.W))
            Broken.error = error('while copying')
            param.array = param.array.view(Broken)
            with pytest.raises(error, match='while copying'):
                load(link, state)
            param.array = before[f'/{name}']  # which could not be written back
            assert_same(arrays_of(link), before)
            if in_channels is None:
                found = vars(link.deform_conv.W)
                assert {name: found[name] for name in attributes} == attributes
                with pytest.raises(RuntimeError, match='grad'):  # as before
                    link.deform_conv.W.grad  # noqa: B018
            load(link, state)
            assert_same(save(link), state)

    def test_initializer_fails(self, load, save):
        link, state = make_layer(None, offset_initialW=Fails()), save(make_layer())
        link.deform_conv.cleargrads()
        before = arrays_of(link)
        with pytest.raises(ArithmeticError, match='initializer'):
            load(link, state)
        assert_same(arrays_of(link), before)
        assert link.deform_conv.W.grad is None
        link.offset_conv.W.initializer = chainer.initializers.Zero()
        load(link, state)
        assert_same(save(link), state)

    def test_parameter_of_another_shape(self, load, save):
        link, state = make_layer(), save(make_layer())
        link.offset_conv.b.array = numpy.zeros((1,), 'f')
        before = arrays_of(link)
        message = r'offset_conv/b of link must have the shape \(54,\), not \(1,\)'
        with pytest.raises(ValueError, match=message):
            load(link, state)
        assert_same(arrays_of(link), before)

    def test_parameters_in_the_state(self, load, save):
        """Arrays that share memory with what is written."""
        link, state = make_layer(), save(make_layer())
        for key, array in state.items():
            for param in link.params():
                if param.shape == array.shape:
                    array[...] = array[::-1]
                    param.array[...] = array[::-1]
                    state[key] = param.array[::-1]
        expected = {key: array.copy() for key, array in state.items()}
        load(link, state)
        assert_same(save(link), expected)


class TorchTensor:
    """A bfloat16 tensor of torch, as far as it is used; see FACTS."""

    dtype = 'torch.bfloat16'

    def __init__(self, array):
        self._array = array

    def float(self):
        return self._array

    def __array__(self, dtype=None, copy=None):
        raise TypeError('Got unsupported ScalarType BFloat16')


FACTS = """
import sys
try:
    import torch
except ImportError as error:
    sys.exit(77)
import numpy
tensor = torch.tensor([0.1], dtype=torch.bfloat16)
assert str(tensor.dtype) == 'torch.bfloat16'
try:
    numpy.asarray(tensor)
except TypeError:
    array = numpy.asarray(tensor.float())
    assert array.dtype == numpy.float32
    assert array.tolist() == [0.10009765625], array
"""


@from_and_to
class TestBfloat16:
    def test_arrays(self, load, save):
        bfloat16 = pytest.importorskip('ml_dtypes').bfloat16
        state = {
            key: array.astype(bfloat16) for key, array in save(make_layer()).items()
        }
        link = make_layer()
        load(link, state)
        assert_same(save(link), as_dtype(state, 'float32'))

    def test_tensors(self, load, save):
        link, state = make_layer(), save(make_layer())
        load(link, {key: TorchTensor(array) for key, array in state.items()})
        assert_same(save(link), state)

    def test_what_a_file_makes_of_them(self, load, save, tmp_path):
        state = {key: array.astype('V2') for key, array in save(make_layer()).items()}
        with pytest.raises(TypeError, match=r'not \|V2 .*view\(ml_dtypes.bfloat16\)'):
            load(make_layer(), state)


def test_facts_about_tensors():
    python = os.environ.get('TORCHVISION_PYTHON', '/usr/bin/python3')
    try:
        process = subprocess.run(
            [python, '-c', FACTS], capture_output=True, text=True, timeout=100
        )
    except OSError as error:
        pytest.skip(f'{python}: {error.strerror}')
    if process.returncode == 77:
        pytest.skip(f'{python} has no torch')
    assert process.returncode == 0, process.stderr


@from_and_to
class TestErrors:
    @pytest.mark.parametrize('in_channels', [6, None])
    @pytest.mark.parametrize('prefix', ['', 'a.b.'])
    @pytest.mark.parametrize(
        ('options', 'spoil', 'error', 'message'),
        [
            ({}, lambda state: [], TypeError, 'state_dict must be a mapping.*list'),
            ({}, lambda state: {}, ValueError, "lacks .*weight'$"),
            (
                {},
                drop('offset_conv.weight', 'conv_offset.weight'),
                ValueError,
                "lacks '",
            ),
            ({}, drop_filter, ValueError, "lacks '[^,]*weight'$"),
            ({}, drop('bias'), ValueError, 'deform_nobias=True'),
            ({}, drop('bias'), ValueError, 'offset_nobias=True'),
            (
                {'deform_nobias': True},
                dict,
                ValueError,
                'made with deform_nobias=False',
            ),
            (
                {'offset_nobias': True},
                dict,
                ValueError,
                'made with offset_nobias=False',
            ),
            (
                {},
                lambda state: {**state, f'{min(state)}.x': numpy.zeros(3)},
                ValueError,
                "has '.*x' besides",
            ),
            ({'modulated': False}, dict, ValueError, r'\(36, 6, 3, 2\), not \(54, '),
            ({'offset_groups': 2}, dict, ValueError, r'\(36, 6, 3, 2\), not \(54, '),
            ({'groups': 1}, dict, ValueError, 'must have the shape .* not '),
            (
                {},
                change('weight', lambda array: array[..., ::-1, :1]),
                ValueError,
                r"weight'\] must have the shape \(.*, 3, 2\), not \(.*, 3, 1\)",
            ),
            (
                {},
                change('weight', lambda array: array.swapaxes(2, 3)),
                ValueError,
                r"weight'\] must have the shape \(.*, 3, 2\), not \(.*, 2, 3\)",
            ),
            (
                {},
                change('weight', numpy.ravel),
                ValueError,
                r"weight'\] must have the shape \(.*, 3, 2\), not \(72,\)",
            ),
            (
                {},
                change('bias', lambda array: array[:, None]),
                ValueError,
                r"bias'\] must have the shape \(4,\), not \(4, 1\)",
            ),
            (
                {},
                change('bias', lambda array: array * 1j),
                TypeError,
                r"bias'\] must hold real numbers, not complex64",
            ),
            (
                {},
                change('bias', lambda array: array > 0),
                TypeError,
                r"bias'\] must hold real numbers, not bool",
            ),
            (
                {},
                change('bias', lambda array: 'abcd'),
                TypeError,
                r"bias'\] must hold real numbers, not <U4",
            ),
            (
                {},
                change('bias', lambda array: None),
                TypeError,
                r"bias'\] must hold real numbers, not object",
            ),
            (
                {},
                change('bias', lambda array: NotForNumPy()),
                TypeError,
                r"bias'\] must be .* not a NotForNumPy: not on this device",
            ),
        ],
    )
    def test_state_that_does_not_fit(
        self, load, save, in_channels, prefix, options, spoil, error, message
    ):
        link = make_layer(in_channels, **options)
        before = arrays_of(link)
        state = spoil(save(make_layer(), prefix=prefix))
        with pytest.raises(error, match=message):
            load(link, state, prefix=prefix)
        assert_same(arrays_of(link), before)

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'groups': 4}, None),
            ({'offset_groups': 4, 'modulated': False}, 'offset_groups must divide'),
        ],
    )
    def test_groups_that_do_not_divide_the_channels(self, load, save, options, message):
        link = make_layer(None, **options)
        before = arrays_of(link)
        with pytest.raises(ValueError, match=message or 'must'):
            load(link, save(make_layer()))
        assert_same(arrays_of(link), before)

    def test_message_says_what_is_there(self, load, save):
        state = {f'layer{i}.weight': numpy.zeros(3) for i in range(300)}
        with pytest.raises(ValueError, match="has 'layer0.weight', .* and 292 more"):
            load(make_layer(), state)

    def test_sampler(self, load, save):
        with pytest.raises(ValueError, match="with 'bias' .* with nobias=False"):
            load(make_sampler(nobias=True), save(make_sampler()))
        with pytest.raises(ValueError, match="without 'bias' .* with nobias=True"):
            load(make_sampler(), save(make_sampler(nobias=True)))
        with pytest.raises(ValueError, match="lacks 'bias', 'weight'"):
            load(make_sampler(), save(make_layer(), prefix='a.'))

    @pytest.mark.parametrize('prefix', ['', 'layer4.0.conv2.'])
    def test_plain_weights(self, load, save, prefix):
        """Those of a convolution, or of a module that is given its offsets."""
        sampler, layer = make_sampler(), make_layer()
        before = arrays_of(layer)
        state = {**save(sampler, prefix=prefix), 'layer4.0.bn.weight': numpy.zeros(3)}
        if not prefix:
            del state['layer4.0.bn.weight']
        message = f"; for weights alone, .* give link.deform_conv .* prefix='{prefix}'$"
        with pytest.raises(ValueError, match=message):
            load(layer, state, prefix=prefix)
        assert_same(arrays_of(layer), before)
        load(layer.deform_conv, state, prefix=prefix)
        assert_same(arrays_of(layer.deform_conv), arrays_of(sampler))
        del state[f'{prefix}bias']
        with pytest.raises(ValueError, match=message):
            load(layer, state, prefix=prefix)

    def test_plain_weights_are_no_hint_elsewhere(self, load, save):
        state = save(make_sampler())
        with pytest.raises(ValueError, match="has 'x.weight' besides$"):
            load(make_layer(), {**save(make_layer()), 'x.weight': numpy.zeros(3)})
        with pytest.raises(ValueError, match="lacks 'bias'[^;]*; without [^;]*$"):
            load(make_sampler(), {'weight': state['weight']})

    @pytest.mark.parametrize('make', [make_layer, make_sampler])
    def test_link_without_parameters(self, load, save, make):
        with pytest.raises(ValueError, match='not initialised'):
            save(make(in_channels=None))

    @pytest.mark.parametrize(
        'link', [L.Convolution2D(6, 4, 3), L.DeformableConvolution2D(6, 4, 3), None]
    )
    def test_other_links(self, load, save, link):
        message = 'link must be a DeformableConvolution2D or .* not a'
        with pytest.raises(TypeError, match=message):
            load(link, save(make_layer()))
        with pytest.raises(TypeError, match=message):
            save(link)

    def test_prefix_that_is_no_str(self, load, save):
        for prefix in None, 3, ('a', 'b'):
            with pytest.raises(TypeError, match='prefix must be a str'):
                load(make_layer(), {}, prefix=prefix)
            with pytest.raises(TypeError, match='prefix must be a str'):
                save(make_layer(), prefix=prefix)


def test_wrapper_without_its_offset_convolution():
    state = to_torchvision(make_sampler(), prefix='a.dcn.')
    with pytest.raises(ValueError, match="link.deform_conv .* with prefix='a.dcn.'$"):
        from_torchvision(make_layer(), state, prefix='a.', deform_conv='dcn')


@pytest.mark.parametrize(
    ('make', 'names', 'error', 'message'),
    [
        (make_sampler, {'mask_conv': 'm'}, ValueError, 'mask_conv must be None'),
        (
            lambda: make_layer(modulated=False),
            {'mask_conv': 'm'},
            ValueError,
            'mask_conv must be None',
        ),
        (make_layer, {'deform_conv': None}, TypeError, 'deform_conv must be a str'),
        (make_layer, {'offset_conv': 3}, TypeError, 'offset_conv must be a str'),
        (make_layer, {'mask_conv': 3}, TypeError, 'mask_conv must be a str'),
        (
            make_layer,
            {'offset_conv': 'a', 'deform_conv': 'a'},
            ValueError,
            "must differ.*'a'",
        ),
        (make_layer, {'mask_conv': 'offset_conv'}, ValueError, 'must differ'),
    ],
)
def test_names_that_do_not_fit(make, names, error, message):
    link = make()
    with pytest.raises(error, match=message):
        to_torchvision(link, **names)
    with pytest.raises(error, match=message):
        from_torchvision(link, {}, **names)


# Compared with torchvision, in float64: 1e-9 leaves no room for anything but rounding.


def make_link(case, **options):
    """A link for one of torchvision's cases, in float64."""
    options = {
        'stride': case.stride,
        'pad': case.pad,
        'dilate': case.dilate,
        'groups': case.groups,
        'offset_groups': case.offset_groups,
        **options,
    }
    with chainer.using_config('dtype', numpy.float64):
        if case.kind == 'given':
            return DeformableConvolution2DSampler(
                case.c,
                case.out_c,
                case.ksize,
                nobias=not case.bias,
                initial_bias=normal,
                **options,
            )
        return DeformableConvolution2D(
            case.c,
            case.out_c,
            case.ksize,
            offset_nobias=not case.offset_bias,
            offset_initialW=normal,
            offset_initial_bias=normal,
            deform_nobias=not case.bias,
            deform_initial_bias=normal,
            modulated=case.modulated,
            mask_scale=options.pop('mask_scale', case.mask_scale),
            **options,
        )


def load_case(case, link, state):
    if case.kind == 'mmcv':
        from_mmcv(link, state)
    else:
        mask_conv = 'mask_conv' if case.mask_conv else None
        from_torchvision(link, state, mask_conv=mask_conv)


def save_case(case, link):
    if case.kind == 'mmcv':
        return to_mmcv(link)
    return to_torchvision(link, mask_conv='mask_conv' if case.mask_conv else None)


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """Parameters, inputs and outputs of torchvision, by case."""
    path = tmp_path_factory.mktemp('torchvision') / 'made.npz'
    run_with_torch(torchvision_process, 'make', path)
    return torchvision_process.read(path)


@pytest.fixture(scope='module')
def ours(tmp_path_factory):
    """Our outputs, and those of torchvision with our parameters, by case."""
    random = numpy.random.RandomState(1)
    arrays, outputs = {}, {}
    for name, case in CASES.items():
        # A mask that mmcv does not have: it is folded into the filter.
        link = make_link(case, **({'mask_scale': 1.7} if case.kind == 'mmcv' else {}))
        arguments = {'x': random.standard_normal((2, case.c, *case.size))}
        inputs = dict(arguments)
        if case.kind == 'given':
            offset = 2 * random.standard_normal((2, 2 * case.taps, *case.out_size))
            arguments['offset'] = offset
            inputs['offset'] = offset_to_interleaved(offset, case.offset_groups)
            if case.modulated:
                mask = random.uniform(0, 1, (2, case.taps, *case.out_size))
                arguments['mask'] = inputs['mask'] = mask
        outputs[name] = link(**arguments).array
        for key, array in inputs.items():
            arrays[f'{name}|array|{key}'] = array
        for key, array in save_case(case, link).items():
            arrays[f'{name}|state|{key}'] = array
    folder = tmp_path_factory.mktemp('torchvision')
    numpy.savez(folder / 'ours.npz', **arrays)
    run_with_torch(
        torchvision_process, 'run', folder / 'ours.npz', folder / 'theirs.npz'
    )
    with numpy.load(folder / 'theirs.npz') as archive:
        return {name: (outputs[name], archive[name]) for name in CASES}


every_case = pytest.mark.parametrize('name', CASES)


@every_case
def test_their_parameters_give_their_output(theirs, name):
    case, (arguments, state) = CASES[name], theirs[name]
    arguments = dict(arguments)
    y = arguments.pop('y')
    if case.kind == 'given':
        arguments['offset'] = offset_from_interleaved(
            arguments['offset'], case.offset_groups
        )
    link = make_link(case)
    load_case(case, link, state)
    numpy.testing.assert_allclose(link(**arguments).array, y, atol=1e-9)
    assert_same(save_case(case, link), state)


@every_case
def test_our_parameters_give_our_output(ours, name):
    expected, found = ours[name]
    assert abs(expected).max() > 0.5  # or any layer would do
    numpy.testing.assert_allclose(found, expected, atol=1e-9)


def test_module_of_the_documentation(tmp_path):
    page = pathlib.Path(__file__).parents[1] / 'docs' / 'moving_models.rst'
    text = page.read_text(encoding='utf-8')
    (source,) = re.findall(r'^    class Block\(.*?(?=^\S)', text, re.M | re.S)
    (tmp_path / 'block.py').write_text(textwrap.dedent(source), encoding='utf-8')
    run_with_torch(
        torchvision_process, 'block', tmp_path / 'block.py', tmp_path / 'block.npz'
    )
    with numpy.load(tmp_path / 'block.npz') as archive:
        state = dict(archive)
    x, y = state.pop('x'), state.pop('y')
    # As on the page.
    with chainer.using_config('dtype', 'float64'):
        link = DeformableConvolution2D(16, 32, 3, pad=1, modulated=True, mask_scale=2)
    from_torchvision(link, state, mask_conv='mask_conv')
    numpy.testing.assert_allclose(link(x).array, y, atol=1e-9)
