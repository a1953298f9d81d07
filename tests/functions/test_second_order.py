"""Gradients of the gradients of the function."""

import re

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import gradient_check
from chainer.utils.type_check import InvalidType

from chainer_deform.functions import deformable_convolution_2d_sampler
from chainer_deform.links import DeformableConvolution2D
from chainer_deform.sampling import convolution, cpu
from tests import reference
from tests.cases import (
    CASES,
    OFFSETS_TO_OUTSIDE,
    WIDE_CASES,
    Case,
    assert_close,
    infinity_as_nan,
)

every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


def random_gg(arrays, seed=2):
    """What the gradients are multiplied by, one array for each argument."""
    random = numpy.random.RandomState(seed)
    return {
        name: random.uniform(-1, 1, array.shape).astype(array.dtype)
        for name, array in arrays.items()
    }


def second_order(arrays, options, gy, gg, wanted=None):
    """Gradients, by name, of the sum of ``gg`` times the first gradients."""
    variables = {
        name: chainer.Variable(array) for name, array in {'gy': gy, **arrays}.items()
    }
    arguments = {name: variables[name] for name in arrays}
    y = deformable_convolution_2d_sampler(**arguments, **options)
    gradients = chainer.grad(
        [y],
        [variables[name] for name in gg],
        [variables['gy']],
        enable_double_backprop=True,
    )
    names = list(variables) if wanted is None else wanted
    found = chainer.grad(
        gradients,
        [variables[name] for name in names],
        [chainer.Variable(array) for array in gg.values()],
    )
    return {name: None if g is None else g.array for name, g in zip(names, found)}


def check(case, arrays, gy, gg, dtype=None):
    found = second_order(arrays, case.options, gy, gg)
    expected = reference.deformable_convolution_2d_sampler_second_order(
        **arrays, **case.options, gy=gy, gg=gg
    )
    for name, array in {'gy': gy, **arrays}.items():
        if name == 'b':
            assert found[name] is None
            continue
        assert found[name].dtype == array.dtype, name
        assert_close(found[name], expected[name], name, dtype)
    return found


class TestAgainstOracle:
    @every_case
    @pytest.mark.parametrize(
        ('dtype', 'offset_dtype'),
        [
            ('float64', 'float64'),
            ('float32', 'float32'),
            ('float16', 'float32'),
            ('float32', 'float64'),
        ],
    )
    def test_all_gradients_of_all_gradients(self, case, dtype, offset_dtype):
        arrays = case.arrays(dtype, offset_dtype)
        worst = min(dtype, offset_dtype, key=lambda d: numpy.dtype(d).itemsize)
        # Products of numbers that were rounded before: the gradients themselves.
        gg = {name: array / 4 for name, array in random_gg(arrays).items()}
        check(case, arrays, case.gy(dtype), gg, worst)

    @pytest.mark.parametrize('case', WIDE_CASES.values(), ids=WIDE_CASES.keys())
    @pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
    def test_many_channels(self, case, dtype):
        """More than a vector has numbers, and no multiple of them."""
        arrays = case.arrays(dtype)
        gg = {name: array / 8 for name, array in random_gg(arrays).items()}
        check(case, arrays, case.gy(dtype), gg)

    @pytest.mark.parametrize('name', ['x', 'W', 'b'])
    def test_wide_second_gradient_passed_in(self, name):
        """It is computed in float64 then: these sums vanish in float32."""
        arrays = {
            'x': numpy.ones((1, 2, 1, 1), 'f'),
            'offset': numpy.zeros((1, 2, 1, 1), 'f'),
            'W': numpy.ones((1, 2, 1, 1), 'f'),
            'b': numpy.zeros(1, 'f'),
        }
        variables = {name: chainer.Variable(array) for name, array in arrays.items()}
        y = deformable_convolution_2d_sampler(**variables)
        gy = chainer.Variable(numpy.ones((1, 1, 1, 1), 'f'))
        wide = numpy.array([2.0**30 + 1, -(2.0**30)]).reshape(1, 2, 1, 1)
        gg = {name: wide}
        if name == 'b':
            gg = {'b': wide[0, 0, 0], 'W': numpy.array([[[[-(2.0**30)]], [[0]]]])}
        gradients = chainer.grad(
            [y], [variables[name] for name in gg], [gy], enable_double_backprop=True
        )
        gg = [chainer.Variable(array) for array in gg.values()]
        (ggy,) = chainer.grad(gradients, [gy], gg)
        assert ggy.dtype == gy.dtype
        assert ggy.array == 1

    def test_wide_second_gradient_of_the_first_ones(self):
        """The gradient of x is that of a sum over the outputs, which is small."""
        arrays = {
            'x': numpy.ones((1, 1, 1, 1), 'f'),
            'offset': numpy.zeros((1, 2, 1, 1), 'f'),
            'W': numpy.ones((2, 1, 1, 1), 'f'),
        }
        variables = {name: chainer.Variable(array) for name, array in arrays.items()}
        y = deformable_convolution_2d_sampler(**variables)
        gy = chainer.Variable(numpy.ones((1, 2, 1, 1), 'f'))
        (gW,) = chainer.grad([y], [variables['W']], [gy], enable_double_backprop=True)
        wide = numpy.array([2.0**30 + 1, -(2.0**30)]).reshape(2, 1, 1, 1)
        (gx,) = chainer.grad([gW], [variables['x']], [chainer.Variable(wide)])
        assert gx.dtype == numpy.float32
        assert gx.array == 1

    def test_wide_gradient_has_a_wide_gradient(self):
        case = CASES['mask']
        arrays = case.arrays('float32')
        check(case, arrays, case.gy('float64'), random_gg(arrays))

    @pytest.mark.parametrize('name', ['all', 'depthwise', 'no bias'])
    @pytest.mark.parametrize('given', ['x', 'offset', 'mask', 'W', 'b'])
    def test_gradients_of_one_gradient(self, name, given):
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        gg = random_gg(arrays)
        if given not in gg:
            pytest.skip(f'there is no {given}')
        gg = {given: gg[given]}
        found = second_order(arrays, case.options, gy, gg)
        expected = reference.deformable_convolution_2d_sampler_second_order(
            **arrays, **case.options, gy=gy, gg=gg
        )
        for name, array in found.items():
            if array is None:
                assert name == 'b' or not expected[name].any()
            else:
                assert_close(array, expected[name], name)

    @pytest.mark.parametrize(
        'wanted', [('gy',), ('x',), ('offset',), ('mask', 'x'), ('W',), ('gy', 'mask')]
    )
    def test_only_the_gradients_asked_for(self, wanted):
        case = CASES['all']
        arrays, gy = case.arrays(), case.gy()
        gg = random_gg(arrays)
        expected = second_order(arrays, case.options, gy, gg)
        found = convolution.double_backward(
            cpu, case.geometry, wanted, gg, gy, **arrays
        )
        assert found.keys() == set(wanted)
        for name, array in found.items():
            assert_close(array, expected[name], name)

    @pytest.mark.parametrize('seed', range(4))
    @pytest.mark.parametrize('dtype', ['float32', 'float64'])
    def test_hostile_offsets(self, seed, dtype):
        """A point outside passes nothing; a NaN offset spoils what it makes only."""
        case = Case(c=4, out_c=2, pad=(1, 0), groups=2, offset_groups=2, mask=True)
        arrays, gy = case.arrays(dtype), case.gy(dtype)
        random = numpy.random.RandomState(seed)
        flat = arrays['offset'].reshape(-1)
        for value in numpy.nan, numpy.inf, -numpy.inf, 3e38, -3e38, 2**31, -1, 2**63:
            flat[random.randint(flat.size, size=2)] = value
        check(case, arrays, gy, random_gg(arrays))

    @pytest.mark.parametrize(('v', 'u'), OFFSETS_TO_OUTSIDE)
    @pytest.mark.parametrize('value', [numpy.inf, -numpy.inf, numpy.nan])
    def test_point_outside_passes_nothing(self, v, u, value):
        """Neither times a mask or gradient, nor where it would move to."""
        case = Case(n=2, c=2, out_c=3, pad=(1, 0), mask=True)
        image, tap, row, col = 1, 3, 2, 3
        arrays, gy, gg = case.arrays(), case.gy(), random_gg(case.arrays())
        arrays['offset'][image, tap, row, col] = u
        arrays['offset'][image, 6 + tap, row, col] = v
        clean = second_order(arrays, case.options, gy, gg)

        def outside(gradients):
            coordinates = gradients['offset'][image, [tap, 6 + tap], row, col]
            return [*coordinates, gradients['mask'][image, tap, row, col]]

        spoilt = {**arrays, 'mask': arrays['mask'].copy()}
        spoilt['mask'][image, tap, row, col] = value
        found = second_order(spoilt, case.options, gy, gg)
        assert outside(found) == [0, 0, 0]
        for name in 'x', 'offset', 'mask':
            assert_close(found[name], clean[name], name)

        spoilt_gy = gy.copy()
        spoilt_gy[image, 0, row, col] = value
        found = second_order(arrays, case.options, spoilt_gy, gg)
        assert outside(found) == [0, 0, 0]
        expected = reference.deformable_convolution_2d_sampler_second_order(
            **arrays, **case.options, gy=spoilt_gy, gg=gg
        )
        for name in 'gy', 'x', 'offset', 'mask', 'W':
            assert_close(
                infinity_as_nan(found[name]), infinity_as_nan(expected[name]), name
            )

        gg['offset'][image, [tap, 6 + tap], row, col] = value
        gg['mask'][image, tap, row, col] = value
        found = second_order(arrays, case.options, gy, gg)
        for name in 'gy', 'x', 'offset', 'mask', 'W':
            assert_close(found[name], clean[name], name)

    def test_points_on_lattice_lines(self):
        case = CASES['mask']
        arrays, gy = case.arrays(), case.gy()
        arrays['offset'] = numpy.round(arrays['offset'] * 3)
        check(case, arrays, gy, random_gg(arrays))


class TestArrays:
    @pytest.mark.parametrize('piece_bytes', [1, 5_000])
    @pytest.mark.parametrize('name', ['all', 'depthwise', 'stride, pad', 'empty batch'])
    def test_piece_size_does_not_matter(self, name, piece_bytes, loops, monkeypatch):
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        gg = random_gg(arrays)
        expected = second_order(arrays, case.options, gy, gg)
        monkeypatch.setattr(cpu, 'BATCH_BYTES', piece_bytes)
        monkeypatch.setattr(loops, 'TILE_BYTES', piece_bytes)
        found = second_order(arrays, case.options, gy, gg)
        for name in {'gy', *arrays} - {'b'}:
            assert_close(found[name], expected[name], name)

    @pytest.mark.parametrize('name', ['plain', 'all', 'depthwise'])
    @pytest.mark.parametrize('given', [('x', 'offset', 'W'), ('W',), ('offset',)])
    def test_unclean_memory(self, name, given, unclean_memory):
        """What is not written must not be read."""
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        gg = {name: random_gg(arrays)[name] for name in given}
        expected = second_order(arrays, case.options, gy, gg)
        unclean_memory()
        found = second_order(arrays, case.options, gy, gg)
        for name, array in found.items():
            if array is not None:
                assert_close(array, expected[name], name)

    def test_large_images(self, peak_of):
        """Beside the results two copies of one image, though three are looked at."""
        case = Case(n=2, c=64, out_c=1, size=(20, 20), ksize=(1, 1), stride=(26, 21))
        arrays = case.arrays('float32')
        arrays['x'] = numpy.ones((2, 64, 500, 400), 'f')
        gg = {**random_gg(case.arrays('float32')), 'x': arrays['x']}
        image = arrays['x'][0].nbytes

        def compute():
            convolution.double_backward(
                cpu, case.geometry, ['x', 'offset', 'W'], gg, case.gy('f'), **arrays
            )

        assert peak_of(compute) < 2 * image + 2 * image + (16 << 20)

    @pytest.mark.parametrize('wanted', [['gy'], ['x', 'offset', 'mask', 'W']])
    @pytest.mark.parametrize('threads', [1, 16])
    def test_memory_is_bounded(self, threads, wanted, peak_of, monkeypatch):
        """Of many tiles, with any number of threads: all columns would take 81 MiB."""
        monkeypatch.setenv('OMP_NUM_THREADS', str(threads))
        case = Case(
            n=2, c=64, out_c=16, size=(152, 145), ksize=(3, 3), groups=2, mask=True
        )
        arrays, gy, gg = case.arrays('f'), case.gy('f'), random_gg(case.arrays('f'))

        def compute():
            found.append(
                convolution.double_backward(
                    cpu, case.geometry, wanted, gg, gy, **arrays
                )
            )

        found = []
        peak = peak_of(compute)
        results = sum(array.nbytes for array in found[0].values())
        assert peak < results + 3 * arrays['x'][0].nbytes + (40 << 20)

    @pytest.mark.parametrize('wanted', ['gy', 'W'])
    def test_columns_keep_to_their_budget(self, wanted, loops, peak_of, monkeypatch):
        """There are two of them at a time, which move and which stand."""
        monkeypatch.setenv('OMP_NUM_THREADS', '1')
        monkeypatch.setattr(loops, 'TILE_BYTES', 16 << 20)
        case = Case(n=1, c=64, out_c=1, size=(98, 91), ksize=(3, 3), bias=False)
        arrays, gy, gg = case.arrays('f'), case.gy('f'), random_gg(case.arrays('f'))

        def compute():
            convolution.double_backward(
                cpu, case.geometry, [wanted, 'x'], gg, gy, **arrays
            )

        compute()
        known = 4 * arrays['x'].nbytes
        assert peak_of(compute) < known + ((16 + 8) << 20)

    @pytest.mark.parametrize(
        'case',
        [
            CASES['all'],
            Case(n=1, c=48, out_c=3, mask=True),
            Case(n=9, c=8, out_c=6, groups=2, offset_groups=4, mask=True),
        ],
        ids=['all', 'many channels', 'many images'],
    )
    def test_threads_do_not_matter(self, case, monkeypatch):
        arrays, gy = case.arrays(), case.gy()
        gg = random_gg(arrays)
        expected = second_order(arrays, case.options, gy, gg)
        monkeypatch.setattr(cpu, 'THREAD_WORK', 1)
        monkeypatch.setenv('OMP_NUM_THREADS', '3')
        found = second_order(arrays, case.options, gy, gg)
        for name in {'gy', *arrays} - {'b'}:
            assert_close(found[name], expected[name], name)

    @pytest.mark.parametrize('name', ['all', 'depthwise'])
    def test_memory_order_and_inputs(self, name):
        """Any memory order will do, and no input is written to."""
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        gg = random_gg(arrays)
        expected = second_order(arrays, case.options, gy, gg)

        def fortran(array):
            array = numpy.asfortranarray(array)
            array.setflags(write=False)
            return array

        found = second_order(
            {name: fortran(array) for name, array in arrays.items()},
            case.options,
            fortran(gy),
            {name: fortran(array) for name, array in gg.items()},
        )
        for name in {'gy', *arrays} - {'b'}:
            assert_close(found[name], expected[name], name)


class TestGraph:
    @pytest.mark.parametrize(
        'name', ['plain', 'stride, pad', 'mask', 'offset groups', 'all', 'depthwise']
    )
    def test_finite_differences(self, name):
        case = CASES[name]
        arrays, gy = case.arrays(), case.gy()
        names = list(arrays)
        gg = random_gg(arrays)
        gradient_check.check_double_backward(
            lambda *args: deformable_convolution_2d_sampler(
                **dict(zip(names, args)), **case.options
            ),
            tuple(arrays.values()),
            gy,
            tuple(gg.values()),
            eps=1e-4,
            rtol=1e-4,
            atol=1e-4,
        )

    @pytest.mark.parametrize('type_check', [True, False])
    @pytest.mark.parametrize(
        'shape', [(1, 4, 3, 6), (2, 4, 3, 5), (2, 4, 1, 1), (2, 4, 6, 12), (4, 3, 6)]
    )
    def test_shape_of_the_gradient_passed_in(self, shape, type_check):
        """Which Chainer does not check."""
        case = CASES['plain']
        x = chainer.Variable(case.arrays()['x'])
        arguments = case.arrays()
        del arguments['x']
        with chainer.using_config('type_check', type_check):
            y = deformable_convolution_2d_sampler(x, **arguments, **case.options)
            gy = chainer.Variable(numpy.zeros(shape))
            match = r'(?s)gradient of y has the shape \(2, 4, 3, 6\).*' + re.escape(
                str(shape)
            )
            with pytest.raises(InvalidType, match=match):
                chainer.grad([y], [x], [gy])

    @pytest.mark.parametrize('dtype', ['int64', 'complex64'])
    def test_dtype_of_the_second_gradient_passed_in(self, dtype):
        arrays = CASES['plain'].arrays()
        x, W = (chainer.Variable(arrays[name]) for name in ('x', 'W'))
        y = deformable_convolution_2d_sampler(x, arrays['offset'], W)
        (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
        ggx = chainer.Variable(numpy.ones(x.shape, dtype))
        with pytest.raises(InvalidType, match='gradient of the gradient of x .* float'):
            chainer.grad([gx], [W], [ggx])

    @pytest.mark.parametrize('shape', [(1, 3, 5, 7), (2, 3, 5, 8), (2, 3, 1, 1)])
    def test_shape_of_the_second_gradient_passed_in(self, shape):
        case = CASES['plain']
        x = chainer.Variable(case.arrays()['x'])
        W = chainer.Variable(case.arrays()['W'])
        offset = case.arrays()['offset']
        y = deformable_convolution_2d_sampler(x, offset, W)
        gy = chainer.Variable(numpy.ones_like(y.array))
        (gx,) = chainer.grad([y], [x], [gy], enable_double_backprop=True)
        with pytest.raises(InvalidType, match=r'gradient of the gradient of x'):
            chainer.grad([gx], [W], [chainer.Variable(numpy.zeros(shape))])

    def test_no_third_order(self):
        case = CASES['plain']
        x = chainer.Variable(case.arrays()['x'])
        arguments = case.arrays()
        del arguments['x']
        W = chainer.Variable(arguments.pop('W'))
        y = deformable_convolution_2d_sampler(x, W=W, **arguments, **case.options)
        (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
        (gW,) = chainer.grad([F.sum(gx * gx)], [W], enable_double_backprop=True)
        with pytest.raises(RuntimeError, match='differentiable twice'):
            F.sum(gW * gW).backward()


class Critic(chainer.Chain):
    """Tells two kinds of images apart, by a number."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.first = L.Convolution2D(2, 6, 3, pad=1)
            self.deform = DeformableConvolution2D(
                6, 8, 3, pad=1, groups=2, offset_groups=3, modulated=True
            )
            self.last = L.Linear(8, 1)

    def forward(self, x):
        h = F.leaky_relu(self.first(x))
        h = F.leaky_relu(self.deform(h))
        return self.last(F.mean(h, axis=(2, 3)))


def test_gradient_penalty():
    """WGAN-GP: between real and false images the critic learns a slope of 1.

    Without the penalty its slope, and with it the distance, grows past all bounds.
    """
    numpy.random.seed(0)
    random = numpy.random.RandomState(0)
    critic = Critic()
    optimizer = chainer.optimizers.Adam(0.01, beta1=0.5, beta2=0.9).setup(critic)
    distances, penalties = [], []
    for _ in range(80):
        real = random.normal(1, 0.3, (8, 2, 7, 6)).astype('f')
        false = random.normal(-1, 0.3, (8, 2, 7, 6)).astype('f')
        share = random.uniform(size=(8, 1, 1, 1)).astype('f')
        between = chainer.Variable(share * real + (1 - share) * false)
        (gradient,) = chainer.grad(
            [critic(between)], [between], enable_double_backprop=True
        )
        norm = F.sqrt(F.batch_l2_norm_squared(gradient))
        penalty = F.mean_squared_error(norm, numpy.ones_like(norm.array))
        critic.cleargrads()
        penalty.backward()
        for parameter in critic.deform.params():  # all but the bias have a gradient
            if parameter is not critic.deform.deform_conv.b:
                assert abs(parameter.grad).max() > 0
        distance = F.mean(critic(real)) - F.mean(critic(false))
        critic.cleargrads()
        (100 * penalty - distance).backward()
        optimizer.update()
        distances.append(float(distance.array))
        penalties.append(float(penalty.array))
    assert penalties[0] > 0.5
    assert numpy.mean(penalties[-10:]) < 0.05
    # The images are 2 * sqrt(2 * 7 * 6) = 18.3 apart.
    assert 16 < numpy.mean(distances[-10:]) < 21
