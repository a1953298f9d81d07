"""Layers of torchvision, and mmcv's on top of it, for ``test_convert.py``.

``python torchvision_process.py make OUT.npz`` writes random parameters, inputs and
outputs of all cases; ``python torchvision_process.py run IN.npz OUT.npz`` loads
parameters and writes the outputs by case; ``python torchvision_process.py block PAGE.py
OUT.npz`` writes parameters, input and output of a module ``Block``. It runs under any
Python that has torch, torchvision and NumPy, and exits with ``MISSING`` where one of
the former is not there.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy

MISSING = 77


class Case(NamedTuple):
    """A layer; all are asymmetric, so that swapped axes cannot hide.

    ``kind`` is ``'given'`` for a ``DeformConv2d`` that is given its offsets,
    ``'wrapper'`` for a module that holds one, ``'mmcv'`` for one of mmcv's packs.
    """

    kind: str
    modulated: bool = False
    bias: bool = True
    offset_bias: bool = True
    mask_conv: bool = False
    mask_scale: float = 1.0
    c: int = 6
    out_c: int = 4
    groups: int = 2
    offset_groups: int = 3
    size: tuple = (9, 8)
    ksize: tuple = (3, 2)
    stride: tuple = (2, 1)
    pad: tuple = (1, 0)
    dilate: tuple = (2, 1)

    @property
    def taps(self) -> int:
        return self.offset_groups * self.ksize[0] * self.ksize[1]

    @property
    def out_size(self) -> tuple:
        return tuple(
            (size + 2 * pad - dilate * (ksize - 1) - 1) // stride + 1
            for size, ksize, stride, pad, dilate in zip(
                self.size, self.ksize, self.stride, self.pad, self.dilate
            )
        )


CASES = {
    'given': Case('given'),
    'given, mask': Case('given', modulated=True, offset_groups=2),
    'given, no bias': Case('given', modulated=True, bias=False, groups=1),
    'wrapper': Case('wrapper'),
    'wrapper, no biases': Case('wrapper', bias=False, offset_bias=False, groups=1),
    'wrapper, mask': Case('wrapper', modulated=True, bias=False, offset_groups=2),
    'wrapper, mask conv': Case('wrapper', modulated=True, mask_conv=True, groups=1),
    'wrapper, 2 * mask': Case('wrapper', modulated=True, mask_conv=True, mask_scale=2),
    'mmcv v1': Case('mmcv', bias=False),
    'mmcv v1, plain': Case('mmcv', bias=False, groups=1, offset_groups=1, pad=(2, 3)),
    'mmcv v2': Case('mmcv', modulated=True),
    'mmcv v2, no bias': Case('mmcv', modulated=True, bias=False, offset_groups=2),
}


def make(out: str) -> None:
    torch.manual_seed(0)
    arrays = {}
    for name, case in CASES.items():
        module = make_module(case)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        inputs = {'x': torch.randn(2, case.c, *case.size)}
        if case.kind == 'given':
            shape = (2, 2 * case.taps, *case.out_size)
            inputs['offset'] = 2 * torch.randn(shape)
            if case.modulated:
                inputs['mask'] = torch.rand(2, case.taps, *case.out_size)
        y = output(module, inputs)
        for key, tensor in {**inputs, 'y': y}.items():
            arrays[f'{name}|array|{key}'] = tensor.numpy()
        for key, tensor in module.state_dict().items():
            arrays[f'{name}|state|{key}'] = tensor.numpy()
    numpy.savez(out, **arrays)


def run(path: str, out: str) -> None:
    outputs = {}
    for name, (inputs, state) in read(path).items():
        module = make_module(CASES[name])
        module.load_state_dict(tensors(state), strict=True)
        outputs[name] = output(module, tensors(inputs)).numpy()
    numpy.savez(out, **outputs)


def block(path: str, out: str) -> None:
    names = {'torch': torch, 'torchvision': torchvision}
    with open(path) as source:
        exec(source.read(), names)
    torch.manual_seed(0)
    module = names['Block']()
    x = torch.randn(2, 16, 9, 8)
    state = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
    numpy.savez(out, x=x.numpy(), y=output(module, {'x': x}).numpy(), **state)


def read(path) -> dict:
    """For each case its arrays by name, and apart from them its parameters."""
    cases = {name: ({}, {}) for name in CASES}
    with numpy.load(path) as archive:
        for key, array in archive.items():
            case, kind, name = key.split('|')
            cases[case][kind == 'state'][name] = array
    return cases


def tensors(arrays: dict) -> dict:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def output(module, inputs: dict):
    with torch.no_grad():
        return module(*(inputs[k] for k in ('x', 'offset', 'mask') if k in inputs))


def make_module(case: Case):
    options = {'stride': case.stride, 'padding': case.pad, 'dilation': case.dilate}

    def conv(channels, bias):
        return torch.nn.Conv2d(case.c, channels, case.ksize, bias=bias, **options)

    def deformable_conv():
        return torchvision.ops.DeformConv2d(
            case.c,
            case.out_c,
            case.ksize,
            groups=case.groups,
            bias=case.bias,
            **options,
        )

    class Wrapper(torch.nn.Module):
        """What people write around torchvision's layer."""

        def __init__(self):
            super().__init__()
            together = case.modulated and not case.mask_conv
            channels = (3 if together else 2) * case.taps
            self.offset_conv = conv(channels, case.offset_bias)
            if case.mask_conv:
                self.mask_conv = conv(case.taps, case.offset_bias)
            self.deform_conv = deformable_conv()

        def forward(self, x):
            offset, mask = self.offset_conv(x), None
            if case.mask_conv:
                mask = self.mask_conv(x)
            elif case.modulated:
                offset, mask = torch.split(offset, [2 * case.taps, case.taps], 1)
            if mask is not None:
                mask = case.mask_scale * torch.sigmoid(mask)
            return self.deform_conv(x, offset, mask)

    class Pack(torch.nn.Module):
        """What mmcv's packs compute, with parameters of the same names."""

        def __init__(self):
            super().__init__()
            shape = (case.out_c, case.c // case.groups, *case.ksize)
            self.weight = torch.nn.Parameter(torch.empty(shape))
            self.bias = None
            if case.bias:
                self.bias = torch.nn.Parameter(torch.empty(case.out_c))
            self.conv_offset = conv((3 if case.modulated else 2) * case.taps, True)

        def forward(self, x):
            offset, mask = self.conv_offset(x), None
            if case.modulated:
                first, second, mask = torch.chunk(offset, 3, dim=1)
                offset = torch.cat((first, second), dim=1)
                mask = torch.sigmoid(mask)
            return torchvision.ops.deform_conv2d(
                x, offset, self.weight, self.bias, mask=mask, **options
            )

    return {'given': deformable_conv, 'wrapper': Wrapper, 'mmcv': Pack}[case.kind]()


if __name__ == '__main__':
    try:
        import torch
        import torchvision
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    torch.set_default_dtype(torch.float64)
    {'make': make, 'run': run, 'block': block}[sys.argv[1]](*sys.argv[2:])
