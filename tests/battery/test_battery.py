"""What ``make test-numpy`` rests on; two NumPys are not compared here."""

import re

import chainer
import chainer.functions as F
import numpy
import pytest

from tests.battery import compare, run
from tests.battery.arguments import DTYPES, Values, call, index, real
from tests.battery.calls import CALLS


def test_no_function_is_forgotten(monkeypatch, capsys, tmp_path):
    assert run.functions_without_calls() == []
    assert F.mean is F.average  # the one alias
    assert 'mean' not in CALLS
    assert all(CALLS.values())
    monkeypatch.setattr(F, 'newer_function', lambda x: x, raising=False)
    monkeypatch.setattr(F, 'another_name', F.relu, raising=False)
    with pytest.raises(SystemExit, match='no arguments for newer_function$'):
        run.main(str(tmp_path / 'results'))
    assert not list(tmp_path.iterdir())


def test_floats_are_tried_as_numpy_scalars():
    names = run.all_calls()
    assert 'elu(3x5, alpha=0.3)' in names
    function, changed = names['elu(3x5, alpha=0.3) [NumPy scalars]']
    assert function is F.elu
    alpha = changed.make('float32').options['alpha']
    assert type(alpha) is numpy.float64
    assert alpha == 0.3
    assert 'elu(3x5) [NumPy scalars]' not in names


def test_arguments_are_the_same_on_every_numpy():
    made = call(real(2, 2), index(3, upto=9), Values([1.5], 'float32')).make('float16')
    x, i, values = made.args
    assert x.dtype == numpy.float16
    assert (256 * x.array).tolist() == [[19, 269], [-455, -441]]
    assert i.tolist() == [2, 0, 4]
    assert (i.dtype, values.dtype) == (numpy.int32, numpy.float32)
    assert made.variables == [x]
    assert made.arrays == [i, values]


@pytest.mark.parametrize('dtype', DTYPES)
def test_values_are_exact_and_not_on_kinks(dtype):
    x = real(50, 40).make(numpy.random.RandomState(0), dtype)
    wide = real(50, 40).make(numpy.random.RandomState(0), 'float64')
    assert x.dtype == dtype
    if x.dtype.kind == 'f':
        numpy.testing.assert_array_equal(x.astype('float64'), wide)
        assert (x * 128 % 1 == 0.5).all()
    else:
        assert len(numpy.unique(x)) == {'b': 2, 'u': 9, 'i': 16}[x.dtype.kind]


def test_evaluate():
    def scaled(x, factor, count):
        count += 1
        return factor * x**3, [None, x.array > 0]

    y = run.evaluate(scaled, call(real(3), 2.0, Values([4], 'int32')), 'float32')
    assert sorted(y) == ['changed 0', 'ggx 0', 'ggx 1', 'gx 0', 'y 0', 'y 1', 'y 2']
    assert y['y 0'].dtype == y['ggx 1'].dtype == numpy.float32
    assert y['y 1'].item() == 'None'
    assert y['changed 0'].tolist() == [5]


def test_evaluate_errors_and_warnings():
    def fails(x):
        numpy.float16(60000) * numpy.float16(2)
        raise ZeroDivisionError('in\ntwo lines')

    y = run.evaluate(fails, call(real(3)), 'float32')
    assert y.pop('y').item() == 'ZeroDivisionError: in\ntwo lines'
    assert y.pop('warnings').item() == 'RuntimeWarning'
    assert not y

    # The first gradient is there, where the second is refused.
    y = run.evaluate(F.forget, CALLS['forget'][0], 'float32')
    assert 'gx 0' in y
    assert y['ggx'].item().startswith('RuntimeError: ')


def test_evaluate_is_deterministic():
    for name in 'dropout', 'gaussian', 'rrelu':
        first, second = (
            run.evaluate(getattr(F, name), CALLS[name][0], 'float32') for _ in range(2)
        )
        assert compare.differences(first, second) == {}
        numpy.testing.assert_array_equal(first['y 0'], second['y 0'])


def test_test_mode():
    x = CALLS['zoneout'][-1]
    assert not x.train
    made = x.make('float32')
    y = run.evaluate(F.zoneout, x, 'float32')
    numpy.testing.assert_array_equal(y['y 0'], made.args[1].array)
    assert chainer.config.train


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ([1.0, 2.0], [1.0, 2.0 + 2**-10], '1 of 2: 2.0 -> 2.0009765625'),
        ([1.0, numpy.nan], [1.0, 2.0], '1 of 2: nan -> 2.0'),
        ([numpy.inf, 1.0], [-numpy.inf, 1.0], '1 of 2: inf -> -inf'),
        ([numpy.inf, 1.0], [numpy.nan, 1.0], '1 of 2: inf -> nan'),
        ([1.0], [[1.0]], r'float32 \(1,\) -> float32 \(1, 1\)'),
        ('ValueError: a', 'TypeError: a', 'ValueError: a -> TypeError: a'),
        ('ValueError: a', [1.0], r'ValueError: a -> float32 \(1,\)'),
        ([1.0], 'None', r'float32 \(1,\) -> None'),
        ('', 'RuntimeWarning', ' -> RuntimeWarning'),
    ],
)
def test_difference(old, new, message):
    old, new = (numpy.array(x, None if isinstance(x, str) else 'f') for x in (old, new))
    assert re.fullmatch(message, compare.difference(old, new))
    assert compare.difference(old, old) == compare.difference(new, new) == ''


def test_difference_of_dtypes():
    for dtype in 'float16', 'float64', 'int32':
        x = numpy.ones(3, dtype)
        text = compare.difference(numpy.ones(3, 'f'), x)
        assert text == f'float32 (3,) -> {dtype} (3,)'
    assert compare.difference(numpy.arange(3), numpy.array([0, 1, 3])) == (
        '1 of 3: 2 -> 3'
    )


@pytest.mark.parametrize('dtype', ['float16', 'float32', 'float64'])
def test_rounding_is_no_difference(dtype):
    eps = numpy.finfo(dtype).eps
    x = numpy.array([1, 0.001, 0], dtype)
    assert compare.difference(x, x + 4 * eps) == ''
    assert compare.difference(x, x + 100 * eps)
    smallest = numpy.finfo(dtype).smallest_subnormal
    assert compare.difference(x * 0, x * 0 + smallest) == ''
    assert compare.difference(x * 0, x * 0 + 2 * smallest)
    assert compare.difference(numpy.array('Error: a'), numpy.array('Error: b')) == ''
    assert (
        compare.difference(numpy.ones((0, 3), dtype), numpy.ones((0, 3), dtype)) == ''
    )


def test_results_that_one_numpy_lacks():
    one = {'f(): float32: y 0': numpy.ones(2, 'f')}
    assert compare.differences(one, {}) == {
        'f(): float32: y 0': 'float32 (2,) -> nothing'
    }
    assert compare.differences({}, one) == {
        'f(): float32: y 0': 'nothing -> float32 (2,)'
    }


def test_an_error_is_one_difference():
    old = {f'f(): float32: gx {i}': numpy.ones(2, 'f') for i in range(3)}
    new = {'f(): float32: gx': numpy.array('TypeError: no')}
    text = {'f(): float32: gx': 'nothing -> TypeError: no'}
    assert compare.differences(old, new) == text


def test_float16_that_loses_everything():
    wide = numpy.array([1e-3, -1e-4])
    name = 'f(): {}: gx 0'.format
    for narrow in [0, 0], [numpy.inf, numpy.nan]:
        narrow = numpy.array(narrow, 'float16')
        results = {name('float16'): narrow, name('float64'): wide}
        assert list(compare.lost(results)) == [name('float16')]
        # float64 has nothing better, or nothing that float16 could hold.
        for same in wide * 0, wide * 1e-9, wide * 1e9:
            assert compare.lost({**results, name('float64'): same}) == {}
    kept = {name('float16'): wide.astype('float16'), name('float64'): wide}
    assert compare.lost(kept) == {}


def test_exit_status(monkeypatch, tmp_path, capsys):
    for known in 'DIFFERENCES', 'REFUSED', 'LOST':
        monkeypatch.setattr(compare, known, [])
    name = 'f(3): float32: y'
    results = {
        f'{name} 0': numpy.arange(6, dtype='f').reshape(2, 3),
        f'{name} 1': numpy.array(True),
        'f(3): int32: y': numpy.array('InvalidType: no ints'),
    }
    old, new = str(tmp_path / 'old'), str(tmp_path / 'new')

    def status(changed):
        run.write(old, results)
        run.write(new, {**results, **changed})
        code = compare.main(old, new)
        return code, capsys.readouterr().out.splitlines()

    code, lines = status({})
    assert code == 0
    assert len(lines) == 1
    code, lines = status({f'{name} 1': numpy.array(False)})
    assert code == 1
    assert lines[0] == f'{name} 1: 1 of 1: True -> False'

    reason = compare.Known(r'^f\(3\): float32: y 1: .* -> False', 'A test.')
    monkeypatch.setattr(compare, 'DIFFERENCES', [reason])
    assert status({f'{name} 1': numpy.array(False)})[0] == 0
    code, lines = status({})
    assert code == 1
    assert lines[0] == f'no longer occurs: {reason.pattern}'

    # A call in a floating dtype must not fail on both, either.
    monkeypatch.setattr(compare, 'DIFFERENCES', [])
    results[name] = numpy.array('ValueError: broken')
    code, lines = status({})
    assert code == 1
    assert lines[0] == f'{name}: ValueError: broken'


def test_every_known_entry_has_a_reason():
    for entry in compare.DIFFERENCES + compare.REFUSED + compare.LOST:
        assert re.compile(entry.pattern)
        assert entry.reason.endswith('.')
