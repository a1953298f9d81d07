"""The CPU's products, of matrices that fill blocks and vectors, and that do not."""

import numpy
import pytest

pytest.importorskip('numba', exc_type=ImportError)
from chainer_deform.sampling import cpu_matmul

dtypes = pytest.mark.parametrize('dtype', ['float32', 'float64'])
TOLERANCE = {'float32': 1e-4, 'float64': 1e-12}
SHAPES = [
    (1, 1, 1), (13, 3, 2), (14, 256, 33), (15, 257, 16), (29, 600, 80), (6, 384, 17),
    (7, 385, 31), (28, 5, 32),
]  # fmt: skip


def guarded(shape, dtype):
    """Memory of ones between other numbers, which have to stay."""
    memory = numpy.full((shape[0], shape[1] + 2, shape[2] + 5), 7, dtype)
    memory[:, 1:-1, 2:-3] = 1
    return memory, memory[:, 1:-1, 2:-3]


def assert_product(memory, out, expected):
    numpy.testing.assert_allclose(out, 1 + expected, atol=TOLERANCE[str(out.dtype)])
    out[...] = 7
    assert (memory == 7).all()


@dtypes
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize(('rows', 'depth', 'width'), SHAPES)
def test_add_product(rows, depth, width, transposed, dtype):
    random = numpy.random.RandomState(0)
    a = random.uniform(-1, 1, (3, rows, depth)).astype(dtype)
    b = random.uniform(-1, 1, (3, depth, width)).astype(dtype)
    memory, out = guarded((3, rows, width), dtype)
    expected = a @ b
    if transposed:
        a = numpy.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2)
    cpu_matmul.add_product(a, b, out)
    assert_product(memory, out, expected)


@dtypes
@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize(('rows', 'depth', 'width'), SHAPES)
def test_multiply(rows, depth, width, transposed, dtype):
    """A packed filter (G, out_c, in_c, K) is the matrix (K * in_c, out_c)."""
    random = numpy.random.RandomState(0)
    K = 5 if depth % 5 == 0 else 3 if depth % 3 == 0 else 1
    filters = random.uniform(-1, 1, (2, width, depth // K, K)).astype(dtype)
    packed = cpu_matmul.Packed(2, depth, width, dtype)
    packed.numbers[...] = numpy.nan
    for panel in packed.panels:
        cpu_matmul.pack_columns(filters, packed, panel)
    a = random.uniform(-1, 1, (2, rows, depth)).astype(dtype)
    expected = a @ filters.transpose(0, 3, 2, 1).reshape(2, depth, width)
    if transposed:
        a = numpy.ascontiguousarray(a.swapaxes(1, 2)).swapaxes(1, 2)
    memory, out = guarded((2, rows, width), dtype)
    cpu_matmul.multiply(a, packed, out)
    assert_product(memory, out, expected)


@pytest.mark.parametrize('what', ['a', 'b'])
def test_what_is_not_finite_spreads_no_further(what):
    """Not to other rows, and not to other columns, also at the edges."""
    a, b = numpy.ones((1, 15, 20), 'f'), numpy.ones((1, 20, 19), 'f')
    (a if what == 'a' else b)[0, -1, -1] = numpy.inf
    out = numpy.zeros((1, 15, 19), 'f')
    cpu_matmul.add_product(a, b, out)
    expected = numpy.full((15, 19), 20, 'f')
    expected[(-1, slice(None)) if what == 'a' else (slice(None), -1)] = numpy.inf
    numpy.testing.assert_array_equal(out[0], expected)


@dtypes
def test_multiply_lanes(dtype):
    random = numpy.random.RandomState(0)
    a, b = (
        random.uniform(-1, 1, shape).astype(dtype) for shape in ((4, 3, 7), (3, 2, 7))
    )
    out = numpy.ones((4, 2, 7), dtype)
    expected = 1 + numpy.einsum('ikg,kjg->ijg', a, b)
    cpu_matmul.multiply_lanes(a, b, out, False)
    numpy.testing.assert_allclose(out, expected, atol=TOLERANCE[dtype])
    out[...] = 1
    cpu_matmul.multiply_lanes(numpy.ascontiguousarray(a.swapaxes(0, 1)), b, out, True)
    numpy.testing.assert_allclose(out, expected, atol=TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize(
    ('rows', 'cols'), [(1, 1), (16, 16), (37, 50), (15, 33), (8, 4)]
)
def test_swap(rows, cols, dtype):
    source = numpy.arange(2.0 * rows * cols).reshape(2, rows, cols).astype(dtype)
    wide = numpy.zeros((2, rows, cols + 3), dtype)
    wide[:, :, :cols] = source
    memory = numpy.full((2, cols, rows + 4), -1, dtype)
    cpu_matmul.swap(wide[:, :, :cols], memory[:, :, 1 : rows + 1])
    numpy.testing.assert_array_equal(memory[:, :, 1 : rows + 1], source.swapaxes(1, 2))
    assert (memory[:, :, 0] == -1).all()
    assert (memory[:, :, rows + 1 :] == -1).all()
