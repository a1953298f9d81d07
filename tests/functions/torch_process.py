"""Calls functions of ``benchmarks/torch_operators.py``, for ``test_torch.py``.

``python torch_process.py CALLS.json IN.npz OUT.npz`` writes the output and gradients of
each call, by ``name|argument``. The JSON object says of each call, by its name, the
function, its options, and which arguments have gradients; the other file has the
arguments, and ``gy``, the gradient of the output. It runs under any Python that has
torch, torchvision and NumPy, and exits with ``MISSING`` where one of the former is not
there.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy

MISSING = 77


def main(calls: str, path: str, out: str) -> None:
    results = {}
    with numpy.load(path) as archive:
        arrays = dict(archive)
    calls = json.loads(pathlib.Path(calls).read_text())
    for name, (function, options, moving) in calls.items():
        start = f'{name}|'
        tensors = {
            key[len(start) :]: torch.from_numpy(array)
            for key, array in arrays.items()
            if key.startswith(start)
        }
        gy = tensors.pop('gy')
        inputs = [tensors[key].requires_grad_() for key in moving]
        y = getattr(torch_operators, function)(**tensors, **options)
        gradients = torch.autograd.grad(y, inputs, gy)
        for key, tensor in zip(['y', *moving], [y.detach(), *gradients]):
            results[start + key] = tensor.numpy()
    numpy.savez(out, **results)


if __name__ == '__main__':
    sys.path.append(str(pathlib.Path(__file__).parents[2] / 'benchmarks'))
    try:
        import torch
        import torch_operators
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    main(*sys.argv[1:])
