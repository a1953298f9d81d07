"""What the compiler makes of the kernels that take the time: instructions and stores.

A kernel is compiled, and disassembled, with the sizes of a layer with 3 x 3 taps, and
of a sum over 9 points.
"""

import re

import numpy
import pytest

from chainer_deform.sampling import convolution, cuda, weighted_sum
from tests import emulator
from tests.cases import Case, SumCase
from tests.cuda_compile import compiling

both_architectures = pytest.mark.parametrize('architecture', ['sm_80', 'sm_90'])


class Code:
    """A kernel that was launched, and what it is compiled to."""

    def __init__(self, kernel, args):
        self.name = kernel.name.replace('chainer_deform_', '')
        self.source = compiling.generated_source(kernel, args)

    def number(self, name: str) -> int:
        """A constant of the kernel."""
        return int(re.search(rf'#define {name} (\d+)', self.source)[1])

    def hot(self, architecture: str):
        """The instructions up to the last exit, and the loops in them.

        Beyond it is only what follows a shuffle in a warp whose lanes have parted, and
        no function: a division of long integers would be one.
        """
        cubin, _ = compiling.compiled(self.source, architecture)
        instructions, labels = [], {}
        for line in compiling.disassembled(cubin).splitlines():
            label = re.match(r'\s*(\.L_\w+):', line)
            if label:
                labels[label[1]] = len(instructions)
            instruction = re.match(r'\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;', line)
            if instruction:
                instructions.append(instruction[1])
        end = max(i for i, text in enumerate(instructions) if 'EXIT' in text) + 1
        instructions = instructions[:end]
        assert not re.search(r'CALL\S* `\(\$|LDL|STL', ' '.join(instructions))
        loops = []
        for i, text in enumerate(instructions):
            target = re.search(r'BRA\b.*\((\.L_\w+)\)', text)
            if target and labels[target[1]] < i:
                loops.append(instructions[labels[target[1]] : i + 1])
        return instructions, sorted(loops, key=len)

    def per_element(self, architecture: str) -> float:
        """Instructions of a lane, for each number of a column that it makes."""
        instructions, loops = self.hot(architecture)
        vectors = self.number('C') // self.number('OG') // self.number('VEC')
        trips = vectors // self.number('LANES')
        total = len(instructions) + (trips - 1) * len(loops[0])
        return total / (trips * self.number('VEC'))


@pytest.fixture
def launched(monkeypatch):
    """Makes lists of the kernels that a function launches, by name."""

    def launched_by(function):
        codes = {}

        class Kernel:
            def __init__(self, *args, **kwargs):
                self.kernel = compiling.cupy.ElementwiseKernel(*args, **kwargs)

            def __call__(self, *args, size):
                code = Code(self.kernel, args)
                codes.setdefault(code.name, []).append(code)

        # Sort keys have to be numbers, though nothing writes them.
        emulator.emulate(monkeypatch, ElementwiseKernel=Kernel, empty=numpy.zeros)
        function()
        return codes

    return launched_by


def layer(c, dtype, wanted=None, **options):
    """A function that launches the kernels of a layer."""
    options = {'out_c': 1, **options}
    case = Case(n=1, c=c, size=(8, 8), ksize=(3, 3), pad=(1, 1), bias=False, **options)
    arrays = case.arrays(dtype)

    def run():
        convolution.forward(cuda, case.geometry, **arrays)
        convolution.backward(
            cuda, case.geometry, wanted or {*arrays}, case.gy(dtype), **arrays
        )

    return run


def sampled_sum(c, dtype, border):
    """A function that launches the kernels of a sum."""
    case = SumCase(n=1, c=c, size=(8, 8), q=8, points=9)
    arrays, indices = case.arrays(dtype), numpy.zeros(8, numpy.int64)

    def run():
        weighted_sum.forward(cuda, *arrays.values(), indices, border)
        weighted_sum.backward(
            cuda, {*arrays}, case.gy(dtype), *arrays.values(), indices, border
        )

    return run


@pytest.mark.parametrize('c', [64, 256, 512])
@pytest.mark.parametrize(
    ('dtype', 'name', 'most'),
    [
        ('float32', 'sample', {64: 34, 256: 17.6, 512: 14.8}),
        ('float16', 'sample', {64: 24, 256: 17.8, 512: 15.2}),
        ('float32', 'differentiate', {64: 63, 256: 39, 512: 35}),
        ('float16', 'differentiate', {64: 44, 256: 36, 512: 32}),
    ],
)
@both_architectures
def test_instructions_per_element(name, dtype, c, most, architecture, launched):
    (code,) = launched(layer(c, dtype))[name]
    found = code.per_element(architecture)
    print(f'{name} {dtype} C={c} {architecture}: {found:.1f}')
    assert found <= most[c]


@pytest.mark.parametrize('border', ['zero', 'clamp'])
@pytest.mark.parametrize('c', [64, 256])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@both_architectures
def test_instructions_of_a_sum(dtype, c, border, architecture, launched):
    """Per point and channel, and per number of the columns' gradient."""
    codes = launched(sampled_sum(c, dtype, border))
    (code,) = codes['sample_sum']
    _, loops = code.hot(architecture)
    found = len(loops[0]) / (code.number('HELD') * code.number('VEC'))
    (code,) = codes['differentiate']
    gradient = code.per_element(architecture)
    print(f'sum {dtype} {border} C={c} {architecture}: {found:.1f}, {gradient:.1f}')
    assert found <= {64: 21, 256: 17}[c]
    assert gradient <= {64: 70, 256: 40}[c]


@pytest.mark.parametrize(('dtype', 'most'), [('float32', 25), ('float16', 28)])
@pytest.mark.parametrize('kind', ['layer', 'sum'])
@both_architectures
def test_gather_only_multiplies_and_adds(kind, dtype, most, architecture, launched):
    """The loop over the taps of a cell finds no point again."""
    with cuda.chainer.using_config('cudnn_deterministic', True):
        codes = launched(
            layer(256, dtype, {'x'})
            if kind == 'layer'
            else sampled_sum(256, dtype, 'clamp')
        )
    _, loops = codes['gather'][0].hot(architecture)
    print(f'gather {dtype} {architecture}: {len(loops[0])}')
    assert len(loops[0]) <= most


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
@both_architectures
def test_depthwise_reads_and_writes_16_bytes(dtype, architecture, launched):
    codes = launched(layer(64, dtype, out_c=64, groups=64, mask=True))
    for name in 'depthwise', 'depthwise_gcolumns', 'depthwise_gfilters', 'sample':
        (code,) = codes[name]
        text = ' '.join(code.hot(architecture)[0])
        assert re.search(r'STG\.E\.128', text)
        assert not re.search(r'STG\.E(?!\.128)', text)
        if name != 'sample':  # which reads offsets, too
            assert not re.search(r'LDG\.E(?!\.128)', text)


@both_architectures
def test_corners_are_read_before_one_is_used(architecture, launched):
    (code,) = launched(layer(256, 'float32'))['sample']
    _, loops = code.hot(architecture)
    kinds = ''.join(
        'r' if 'LDG' in text else 'w' if 'STG' in text else 'f'
        for text in loops[0]
        if re.search('LDG|STG|FFMA|FMUL', text)
    )
    assert re.fullmatch('r{4}f{16}w', kinds)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'float64'])
@pytest.mark.parametrize('kind', ['layer', 'deterministic layer', 'sum'])
@both_architectures
def test_stores_have_16_bytes(kind, dtype, architecture, launched):
    """But those of the gradients of offsets and factors, and of keys and weights."""
    with cuda.chainer.using_config('cudnn_deterministic', 'deterministic' in kind):
        codes = launched(
            sampled_sum(64, dtype, 'clamp')
            if kind == 'sum'
            else layer(64, dtype, mask=True)
        )
    names = {'swap', 'differentiate', 'sample_sum' if kind == 'sum' else 'sample'}
    if 'deterministic' in kind:
        names.add('gather')
    assert names <= codes.keys()
    words = {'float64': 2}.get(dtype, 4)
    for name in names:
        for code in codes[name]:
            ptx = compiling.ptx(code.source, architecture)
            stores = re.findall(r'st\.global(?:\.v(\d))?\.[a-z]+\d+', ptx)
            wide = [int(width) for width in stores if width]
            assert len(stores) - len(wide) == (3 if name == 'differentiate' else 0)
            if (kind, name) != ('sum', 'differentiate'):  # which has no columns
                assert set(wide) == {words}
            instructions, _ = code.hot(architecture)
            text = ' '.join(instructions)
            assert len(re.findall(r'STG\.E\.128', text)) == len(wide)
            assert len(re.findall(r'STG', text)) == len(stores)
