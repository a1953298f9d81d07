"""The GPU path on NumPy arrays: kernels emulated, products by their pointers."""

import weakref

import chainer
import numpy
import pytest

from chainer_deform.sampling import cuda
from tests import emulator, reference
from tests.cases import CASES, WANTED, Case, assert_close

pytestmark = pytest.mark.skipif(
    emulator.COMPILER is None, reason='the emulator needs a C++ compiler'
)
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulator.emulate(monkeypatch)
    monkeypatch.setattr(cuda, 'MOST_LANES', 1)


@numpy.errstate(all='ignore')  # as on a GPU
def run(case, arrays, gy, wanted=None):
    y = cuda.forward(case.geometry, **arrays)
    wanted = arrays if wanted is None else wanted
    return y, cuda.backward(case.geometry, wanted, gy, **arrays)


@numpy.errstate(all='ignore')
def run_second_order(case, arrays, gy, gg, wanted=None):
    wanted = {'gy', *arrays} - {'b'} if wanted is None else wanted
    return cuda.double_backward(case.geometry, wanted, gg, gy, **arrays)


def tangents(arrays, moving=None):
    """Along which all arguments move, or those named."""
    random = numpy.random.RandomState(2)
    gg = {
        name: random.uniform(-1, 1, array.shape).astype(array.dtype)
        for name, array in arrays.items()
    }
    return {name: gg[name] for name in (arrays if moving is None else moving)}


def check(case, arrays, gy, dtype=None):
    check_first_order(case, arrays, gy, dtype)
    check_second_order(case, arrays, gy, dtype)


def check_first_order(case, arrays, gy, dtype=None):
    y, gradients = run(case, arrays, gy)
    expected_y, expected = reference.deformable_convolution_2d_sampler(
        **arrays, **case.options, gy=gy
    )
    assert y.dtype == arrays['x'].dtype
    assert_close(y, expected_y, 'y', dtype)
    assert gradients.keys() == arrays.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        assert_close(gradient, expected[name], name, dtype)


def check_second_order(case, arrays, gy, dtype=None, moving=None, wanted=None):
    gg = tangents(arrays, moving)
    gradients = run_second_order(case, arrays, gy, gg, wanted)
    expected = reference.deformable_convolution_2d_sampler_second_order(
        **arrays, **case.options, gy=gy, gg=gg
    )
    arguments = {'gy': gy, **arrays}
    assert gradients.keys() == set(wanted or arguments.keys() - {'b'})
    for name, gradient in gradients.items():
        assert gradient.dtype == arguments[name].dtype, name
        assert_close(gradient, expected[name], name, dtype)


@pytest.mark.parametrize('dtype', ['float64', 'float32', 'float16'])
@every_case
def test_output_and_gradients(case, dtype):
    check(case, case.arrays(dtype), case.gy(dtype))


@pytest.mark.parametrize(
    ('dtype', 'offset_dtype'),
    [('float16', 'float32'), ('float32', 'float64'), ('float64', 'float16')],
)
@pytest.mark.parametrize('name', ['all', 'no bias'])
def test_mixed_dtypes(name, dtype, offset_dtype):
    case = CASES[name]
    worst = min(dtype, offset_dtype, key=lambda d: numpy.dtype(d).itemsize)
    check(case, case.arrays(dtype, offset_dtype), case.gy(dtype), worst)


@pytest.mark.parametrize('few_positions', [0, 512])
def test_half_precision_overflows_in_the_result_only(few_positions, monkeypatch):
    """Not in the product before the bias, nor in the columns' gradients."""
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    case = Case(c=2, out_c=64, ksize=(1, 1))
    arrays, gy = case.arrays('float16'), case.gy('float16')
    for name, value in ('x', 100), ('offset', 0), ('W', 350), ('b', -20000):
        arrays[name][...] = value
    y, _ = run(case, arrays, gy)
    numpy.testing.assert_allclose(y, 50000, rtol=1e-3)  # 70,000 - 20,000
    arrays['W'][...] = 10
    gy[...] = 200
    _, gradients = run(case, arrays, gy)  # the columns' are 64 * 10 * 200 = 128,000
    assert not gradients['offset'][:, :, :-1, :-1].any()  # the image is constant
    arrays['W'][...] = 350
    gg = {name: arrays[name] for name in ('x', 'b')}
    gradients = run_second_order(case, arrays, gy, gg, ('gy', 'offset'))
    numpy.testing.assert_array_equal(gradients['gy'], y)
    assert not gradients['offset'][:, :, :-1, :-1].any()


def test_filter_of_another_dtype():
    """As in mixed precision, where parameters may be wider than the data."""
    case = CASES['all']
    arrays = case.arrays('float16')
    arrays['W'], arrays['b'] = (arrays[name].astype('f') for name in ('W', 'b'))
    check(case, arrays, case.gy('float16'), 'float16')


@pytest.mark.parametrize('few_positions', [0, 512])
@pytest.mark.parametrize('column_bytes', [1, 2_000, 10_000])
@pytest.mark.parametrize('name', ['all', 'depthwise', 'plain', 'empty batch'])
def test_pieces(name, column_bytes, few_positions, monkeypatch):
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', column_bytes)
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    check(CASES[name], CASES[name].arrays('float32'), CASES[name].gy('float32'))


@pytest.mark.parametrize('c', [8, 12, 16, 24])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_vectors_of_channels(c, dtype):
    """1 to 8 channels a thread, and whole tiles of the transposition."""
    case = Case(c=c, out_c=4, size=(4, 6), groups=2, offset_groups=2, mask=True)
    check(case, case.arrays(dtype), case.gy(dtype))


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('lanes', [2, 4, 32])
def test_lanes_share_the_channels(lanes, dtype, monkeypatch):
    """Fewer lanes than vectors of channels, and more; they add up what each has."""
    monkeypatch.setattr(cuda, 'MOST_LANES', lanes)
    case = Case(n=1, c=40, out_c=4, size=(3, 4), offset_groups=2, groups=2, mask=True)
    check(case, case.arrays(dtype), case.gy(dtype))


@pytest.mark.parametrize('piece_bytes', [1 << 30, 2_000])
@pytest.mark.parametrize(
    'name', ['all', 'depthwise', 'plain', '1 x 1 image', 'large pad']
)
def test_deterministic(name, piece_bytes, monkeypatch):
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', piece_bytes)
    case = CASES[name]
    with (
        chainer.using_config('cudnn_deterministic', True),
        chainer.using_config('warn_nondeterministic', True),
    ):
        check(case, case.arrays('float32'), case.gy('float32'))
        lattice = case.arrays()
        lattice['offset'] = numpy.round(lattice['offset'])
        check(case, lattice, case.gy())


def test_atomics_are_announced():
    case = CASES['plain']
    with chainer.using_config('warn_nondeterministic', True):
        run(case, case.arrays(), case.gy(), ('offset', 'W', 'b'))
        with pytest.warns(UserWarning, match='atomicAdd'):
            run(case, case.arrays(), case.gy(), ('x',))
        check_second_order(case, case.arrays(), case.gy(), moving=('x', 'b'))
        check_second_order(case, case.arrays(), case.gy(), wanted=('gy', 'offset', 'W'))
        with pytest.warns(UserWarning, match='atomicAdd'):
            check_second_order(case, case.arrays(), case.gy(), wanted=('x',))


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('wanted', WANTED)
def test_only_the_gradients_asked_for(wanted, deterministic):
    case = CASES['all']
    _, expected = run(case, case.arrays(), case.gy())
    with chainer.using_config('cudnn_deterministic', deterministic):
        _, gradients = run(case, case.arrays(), case.gy(), wanted)
    assert gradients.keys() == set(wanted)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], name)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('wanted', [None, ('gy',), ('x',), ('mask',), ('offset', 'W')])
@pytest.mark.parametrize(
    'moving',
    [
        (),
        ('b',),
        ('x',),
        ('W',),
        ('offset',),
        ('mask',),
        ('x', 'W', 'b'),
        ('offset', 'mask'),
    ],
)
def test_second_order_of_some(moving, wanted, deterministic):
    case = CASES['all']
    with chainer.using_config('cudnn_deterministic', deterministic):
        check_second_order(case, case.arrays(), case.gy(), moving=moving, wanted=wanted)


def test_second_order_along_the_image_does_not_read_the_image():
    """It is what the first order makes of the other image, as of a gradient penalty."""
    case = CASES['all']
    arrays, gy = case.arrays(), case.gy()
    gg = tangents(arrays, ('x',))
    y, expected = run(case, {**arrays, **gg, 'b': 0 * arrays['b']}, gy)
    arrays['x'][...] = numpy.nan
    gradients = run_second_order(case, arrays, gy, gg)
    assert not gradients['x'].any()
    for name, array in {**expected, 'gy': y}.items():
        if name not in ('x', 'b'):
            assert_close(gradients[name], array, name)


@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('seed', range(5))
def test_hostile_values(seed, dtype, deterministic):
    """They end in the oracle's answer, and no index leaves its array."""
    case = Case(n=2, c=4, out_c=2, pad=(1, 0), groups=2, offset_groups=2, mask=True)
    arrays, gy = case.arrays(dtype), case.gy(dtype)
    random = numpy.random.RandomState(seed)
    values = [numpy.nan, numpy.inf, -numpy.inf, 3e38, -3e38, 2**31, -(2**31), 2**63, -1]
    for value in values:
        flat = arrays['offset'].reshape(-1)
        flat[random.randint(flat.size, size=3)] = value
    for name in 'mask', 'x':
        flat = arrays[name].reshape(-1)
        flat[random.randint(flat.size, size=2)] = values[seed % 3]
    with chainer.using_config('cudnn_deterministic', deterministic):
        check_first_order(case, arrays, gy)
        # Times an infinite mask, the oracle's sum over the channels is that of
        # infinities of both signs.
        arrays['mask'][numpy.isinf(arrays['mask'])] = 1
        check_second_order(case, arrays, gy)


def test_infinite_gradient_of_a_point_outside():
    case = CASES['mask']
    arrays, gy = case.arrays(), case.gy()
    arrays['offset'][0, :, 1, 1] = numpy.inf
    gy[0, :, 1, 1] = numpy.inf
    _, gradients = run(case, arrays, gy, ('offset', 'mask'))
    assert not gradients['offset'][0, :, 1, 1].any()
    assert not gradients['mask'][0, :, 1, 1].any()
    gg = tangents(arrays)
    wanted = 'x', 'offset', 'mask'
    expected = run_second_order(case, arrays, case.gy(), gg, wanted)
    for name in 'offset', 'mask':
        gg[name][0, :, 1, 1] = numpy.nan
    gradients = run_second_order(case, arrays, gy, gg, wanted)
    for name, gradient in gradients.items():
        numpy.testing.assert_array_equal(gradient, expected[name], name)
    assert not gradients['offset'][0, :, 1, 1].any()
    assert not gradients['mask'][0, :, 1, 1].any()
    gradients = run_second_order(case, arrays, case.gy(), gg)
    assert all(numpy.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize('wanted', [None, ('W',), ('x',)])
@pytest.mark.parametrize('few_positions', [0, 512])
def test_one_piece_at_a_time(few_positions, wanted, monkeypatch):
    """The columns of a piece are gone before those of the next are made."""
    monkeypatch.setattr(cuda, 'COLUMN_BYTES', 4_000)
    monkeypatch.setattr(cuda, 'FEW_POSITIONS', few_positions)
    made, alive = [], []
    new_columns = cuda._Taps.new_columns

    def record(taps, dtype):
        columns = new_columns(taps, dtype)
        made.append(weakref.ref(columns))
        alive.append(sum(ref().nbytes for ref in made if ref() is not None))
        return columns

    monkeypatch.setattr(cuda._Taps, 'new_columns', record)
    for case in CASES['all'], CASES['depthwise'], Case(n=9, size=(3, 4)):
        for dtype in 'float32', 'float16':
            arrays, gy = case.arrays(dtype), case.gy(dtype)
            run(case, arrays, gy, wanted)
            for moving in None, ('x',), ('W',):
                run_second_order(case, arrays, gy, tangents(arrays, moving), wanted)
    assert len(made) > 100
    assert max(alive) <= cuda.COLUMN_BYTES


def test_memory_order_does_not_matter():
    case = CASES['all']
    y, gradients = run(case, case.arrays(), case.gy())
    gg = tangents(case.arrays())
    second_order = run_second_order(case, case.arrays(), case.gy(), gg)
    for change in (numpy.asfortranarray, lambda a: numpy.repeat(a, 2, -1)[..., ::2]):
        arrays = {name: change(array) for name, array in case.arrays().items()}
        for array in arrays.values():
            array.setflags(write=False)
        other_y, other = run(case, arrays, change(case.gy()))
        assert_close(other_y, y, 'y')
        for name, gradient in gradients.items():
            assert_close(other[name], gradient, name)
        other_gg = {name: change(array) for name, array in gg.items()}
        other = run_second_order(case, arrays, change(case.gy()), other_gg)
        for name, gradient in second_order.items():
            assert_close(other[name], gradient, name)


def test_swap_of_an_unaligned_array():
    array = numpy.arange(1, 1 + 2 * 8 * 12, dtype='f').reshape(2, 8, 12)
    memory = numpy.zeros(array.size + 1, 'f')
    unaligned = memory[1:].reshape(array.shape)
    unaligned[...] = array
    for source in array, unaligned:
        for dtype in 'float16', 'float64':
            numpy.testing.assert_array_equal(
                cuda._swap(source, numpy.dtype(dtype)), array.swapaxes(1, 2)
            )


@pytest.mark.parametrize(
    ('dtype', 'environment', 'tensor_core', 'expected'),
    [
        ('float32', False, 'auto', 68),
        ('float32', True, 'auto', 77),
        ('float32', True, 'never', 68),
        ('float16', True, 'auto', 68),
        ('float64', True, 'auto', 70),
    ],
)
def test_compute_type(dtype, environment, tensor_core, expected, monkeypatch):
    monkeypatch.setattr(cuda, '_cupy_uses_tf32', lambda: environment)
    with chainer.using_config('use_cudnn_tensor_core', tensor_core):
        assert cuda._compute_type(numpy.dtype(dtype)) == expected


def test_emulator_notices_an_index_outside():
    kernel = emulator.ElementwiseKernel(
        'raw T x, int32 shift', 'raw T y', 'y[i] = x[i + shift];', 'shift'
    )
    x, y = numpy.arange(5.0), numpy.zeros(5)
    kernel(x, 0, y, size=5)
    numpy.testing.assert_array_equal(y, x)
    for shift, size in (1, 5), (-1, 5), (0, 6):
        with pytest.raises(IndexError, match='shift left the array'):
            kernel(x, shift, y, size=size)


def test_emulated_half_is_numpys():
    values = numpy.concatenate(
        [
            numpy.arange(65536, dtype=numpy.uint16).view('float16').astype('f'),
            numpy.random.RandomState(0).normal(size=1000).astype('f')
            * 10.0 ** numpy.arange(-10, 10).repeat(50).astype('f'),
            numpy.array([65519, 65520, 1e30], 'f'),
        ]
    )
    half = numpy.zeros(values.size, 'float16')
    kernel = emulator.ElementwiseKernel(
        'raw T x', 'raw U y', 'y[i] = U(x[i]);', 'convert'
    )
    kernel(values, half, size=values.size)
    back = numpy.zeros_like(values)
    kernel(half, back, size=values.size)
    with numpy.errstate(all='ignore'):
        expected = values.astype('float16')
        numpy.testing.assert_array_equal(half, expected)
        numpy.testing.assert_array_equal(back, expected.astype('f'))
