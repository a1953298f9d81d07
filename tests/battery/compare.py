"""Compares what the battery computed with two NumPys.

``python -m tests.battery.compare OLD NEW`` prints what differs. Its exit status is 1 if
that is not just what is listed here, all of it.
"""

from __future__ import annotations

import dataclasses
import re
import sys

import numpy

from tests.battery.arguments import FLOATS
from tests.battery.run import read

#: How far apart values may be, in eps of their dtype times the largest of the array,
#: and one step of the smallest numbers besides. NumPys come with different BLAS, which
#: add up in another order, and with an exp, log or sin of other last digits. Some sums
#: of float64 have 66003 terms.
EPS = {'float16': 16, 'float32': 16, 'float64': 64}


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known to differ, or to be refused, and does no harm.

    Attributes:
        pattern: A regular expression of a line ``call: dtype: result: difference``.
        reason: Why it is so.

    """

    pattern: str
    reason: str


#: Differences between the NumPys.
DIFFERENCES = [
    Known(
        'uint.*: warnings: DeprecationWarning -> nothing',
        'NumPy 1.24 to 1.26 warn of a negative number that becomes unsigned. On NumPy 2'
        ' the repairs make it unsigned, and nothing is left to warn of.',
    ),
]

#: Calls in a floating dtype that raise an error.
REFUSED = [
    Known(
        r'^(resize_images|bilinear|batch_matmul|roi_\w+_align_2d)\('
        '.*: float(16|64): y: InvalidType',
        'They take float32 only.',
    ),
    Known(
        r'^(cholesky|decorrelated_batch_normalization)\(.*: float16: y: TypeError',
        'LAPACK has no float16.',
    ),
    Known(
        r'^operator\..*: y: InvalidType',
        'Chainer does not mix the dtypes of arrays.',
    ),
    Known(
        r'^operator.pow\(-2, 3x3\): .*: gx: ValueError',
        'The gradient has the logarithm of the base.',
    ),
]

#: Results of float16 that are all zeros, or not finite, where float64 shows better.
LOST: list[Known] = []


def difference(old: numpy.ndarray, new: numpy.ndarray) -> str:
    """Says how two results differ; an empty string if they do not."""
    texts = [x.item() if x.dtype.kind == 'U' else '' for x in (old, new)]
    if any(texts):
        kinds = [text.partition(':')[0] for text in texts]
        return '' if kinds[0] == kinds[1] else _change(*map(_describe, (old, new)))
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return _change(f'{old.dtype} {old.shape}', f'{new.dtype} {new.shape}')
    if old.dtype.kind != 'f':
        wrong = old != new
    else:
        finite = numpy.isfinite(old) & numpy.isfinite(new)
        a, b = (numpy.where(finite, x, 0).astype('float64') for x in (old, new))
        scale = max(abs(a).max(initial=0), abs(b).max(initial=0))
        limits = numpy.finfo(old.dtype)
        wrong = abs(a - b) > (
            EPS[old.dtype.name] * float(limits.eps) * scale
            + float(limits.smallest_subnormal)
        )
        wrong |= ~finite & ~((old == new) | (numpy.isnan(old) & numpy.isnan(new)))
    if not wrong.any():
        return ''
    i = tuple(numpy.argwhere(wrong)[0].tolist())
    return f'{wrong.sum()} of {wrong.size}: {_change(old[i], new[i])}'


def differences(
    old: dict[str, numpy.ndarray], new: dict[str, numpy.ndarray]
) -> dict[str, str]:
    """What differs, by the name of the result."""
    found = {}
    for name in {**old, **new}:
        if name not in old or name not in new:
            # Where a step raised an error, that error is the difference.
            step = name.rpartition(' ')[0]
            if step not in old and step not in new:
                found[name] = _change(*(_describe(x.get(name)) for x in (old, new)))
        else:
            found[name] = difference(old[name], new[name])
    return {name: text for name, text in found.items() if text}


def refusals(results: dict[str, numpy.ndarray]) -> dict[str, str]:
    """The errors of calls and gradients in floating dtypes, by the result's name."""
    return {
        name: _describe(x)
        for name, x in results.items()
        if x.dtype.kind == 'U' and re.search(f': ({"|".join(FLOATS)}): (y|gx)$', name)
    }


def lost(results: dict[str, numpy.ndarray]) -> dict[str, str]:
    """The results of float16 without a nonzero finite value that should have some."""
    found = {}
    tiny = 4 * float(numpy.finfo('float16').smallest_subnormal)
    for name, x in results.items():
        wide = results.get(name.replace(': float16: ', ': float64: '), x)
        if x.dtype != 'float16' or wide.dtype != 'float64' or wide.size == 0:
            continue
        largest = abs(wide).max()
        if tiny < largest < 65504 and not (numpy.isfinite(x) & (x != 0)).any():
            found[name] = f'{x.flat[0]}, not up to {largest}'
    return found


def unexplained(found: dict[str, str], known: list[Known]) -> list[str]:
    """What of this no entry explains, and the entries that explain nothing."""
    used = set()
    lines = []
    for name, text in found.items():
        line = f'{name}: {text}'
        entries = [entry for entry in known if re.search(entry.pattern, line)]
        used.update(entries)
        if not entries:
            lines.append(line)
    unused = [entry for entry in known if entry not in used]
    return lines + [f'no longer occurs: {entry.pattern}' for entry in unused]


def _change(old, new):
    return f'{old} -> {new}'


def _describe(x):
    if x is None:
        return 'nothing'
    if x.dtype.kind == 'U':
        return ' '.join(x.item().split())
    return f'{x.dtype} {x.shape}'


def main(old_path: str, new_path: str) -> int:
    (old_version, old), (new_version, new) = read(old_path), read(new_path)
    found = differences(old, new)
    lines = unexplained(found, DIFFERENCES)
    for check, known in (refusals, REFUSED), (lost, LOST):
        lines += unexplained({**check(old), **check(new)}, known)
    for line in lines:
        print(line)
    print(
        f'NumPy {old_version} and {new_version}: {len(old)} results,'
        f' {len(found)} differ, {len(lines)} unexplained'
    )
    return 1 if lines else 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
