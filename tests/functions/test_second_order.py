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
from tests.cases import CASES, Case, assert_close

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
    products = [F.sum(F.cast(g * a, 'float64')) for g, a in zip(gradients, gg.values())]
    names = list(variables) if wanted is None else wanted
    found = chainer.grad([sum(products)], [variables[name] for name in names])
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

    def test_threads_do_not_matter(self, monkeypatch):
        case = CASES['all']
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
