"""Modules of other programs, written with torch alone, for ``test_convert_operators``.

``python operators_process.py OUT.npz`` writes random parameters, inputs and the output
of each case. It runs under any Python that has torch, torchvision and NumPy, and exits
with ``MISSING`` where one of the former is not there.
"""

from __future__ import annotations

import sys

import numpy

MISSING = 77

#: By case: the kind of module, and the options that its link is made with.
CASES = {
    'internimage': ('internimage', {'offset_groups': 3}),
    'internimage, centre': (
        'internimage',
        {
            'offset_groups': 2,
            'offset_scale': 1.5,
            'dw_ksize': 5,
            'center_scale': True,
            'remove_center': True,
        },
    ),
    'internimage, 5 x 5': ('internimage', {'offset_groups': 2, 'ksize': 5}),
    'internimage, dilation': ('internimage', {'offset_groups': 6, 'dilate': 2}),
    'dcnv4': ('dcnv4', {'offset_groups': 3}),
    'dcnv4, centre': (
        'dcnv4',
        {
            'offset_groups': 2,
            'offset_scale': 2.0,
            'dw_ksize': 5,
            'center_scale': True,
            'remove_center': True,
            'output_nobias': True,
        },
    ),
    'dcnv4, no projections': (
        'dcnv4',
        {'offset_groups': 2, 'ksize': 1, 'pointwise': False},
    ),
    'detr': ('detr', {'levels': 2, 'heads': 3, 'points': 4}),
    'detr, boxes': ('detr', {'levels': 2, 'heads': 2, 'points': 3}),
    'mmcv': ('mmcv', {}),
    'mmcv, modulated': ('mmcv', {'modulated': True}),
}

CHANNELS, SIZE, SHAPES = 6, (5, 7), [(4, 5), (2, 3)]
OUTSIZE, SCALE, FC_SIZE = (3, 2), 0.2, 8


def read(path) -> dict:
    """For each case its arrays by name, and apart from them its parameters."""
    cases = {name: ({}, {}) for name in CASES}
    with numpy.load(path) as archive:
        for key, array in archive.items():
            case, kind, name = key.split('|')
            cases[case][kind == 'state'][name] = array
    return cases


def make(out: str) -> None:
    torch.manual_seed(0)
    arrays = {}
    for name, (kind, options) in CASES.items():
        module = {'internimage': dcn_v3, 'dcnv4': dcn_v4, 'detr': detr, 'mmcv': mmcv}[
            kind
        ](options)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        inputs = make_inputs(name)
        with torch.no_grad():
            inputs['y'] = module.compute(**inputs)
        for key, tensor in inputs.items():
            arrays[f'{name}|array|{key}'] = tensor.numpy()
        for key, tensor in module.state_dict().items():
            arrays[f'{name}|state|{key}'] = tensor.numpy()
    numpy.savez(out, **arrays)


def make_inputs(name: str) -> dict:
    if name.startswith('detr'):
        s = sum(h * w for h, w in SHAPES)
        return {
            'query': torch.randn(2, 3, CHANNELS),
            'reference': torch.rand(2, 3, 2, 4 if 'boxes' in name else 2),
            'value': torch.randn(2, s, CHANNELS),
            'padding_mask': torch.rand(2, s) < 0.3,
        }
    inputs = {'x': torch.randn(2, CHANNELS, *SIZE)}
    if name.startswith('mmcv'):
        boxes = [[1, 2, 3, 30, 20], [0, -4, 6, 12, 24], [1, 0, 0, 33, 25]]
        inputs['boxes'] = torch.tensor(boxes, dtype=torch.float64)
    return inputs


def linear(channels: int, bias: bool = True):
    return torch.nn.Linear(CHANNELS, channels, bias)


def depthwise(ksize: int):
    return torch.nn.Conv2d(
        CHANNELS, CHANNELS, ksize, padding=ksize // 2, groups=CHANNELS
    )


def sample(image, x, y):
    """Reads ``image (n, c, h, w)`` at pixels ``x, y (n, ...)``, 0 outside."""
    n, c, h, w = image.shape
    grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], -1)
    result = torch.nn.functional.grid_sample(
        image, grid.reshape(n, 1, -1, 2), align_corners=False
    )
    return result.reshape(n, c, *x.shape[1:])


def core(x, offset, mask, options):
    """The sum over the taps, channels last; ``offset (n, h, w, G, K, xy)``."""
    k, d = options.get('ksize', 3), options.get('dilate', 1)
    scale, groups = options.get('offset_scale', 1.0), options['offset_groups']
    n, h, w, c = x.shape
    rows = torch.arange(h)[:, None] * torch.ones(1, w)
    columns = torch.arange(w) * torch.ones(h, 1)
    results = []
    for g in range(groups):
        channels = slice(g * c // groups, (g + 1) * c // groups)
        image = x[..., channels].permute(0, 3, 1, 2)
        total, tap = 0, 0
        for i in range(k):  # columns
            for j in range(k):
                if options.get('remove_center') and i == j == k // 2:
                    continue
                dx, dy = offset[:, :, :, g, tap].unbind(-1)
                from_x, from_y = (d * (number - k // 2) for number in (i, j))
                read = sample(
                    image,
                    columns + scale * (from_x + dx),
                    rows + scale * (from_y + dy),
                )
                total = total + read * mask[:, None, :, :, g, tap]
                tap += 1
        results.append(total)
    return torch.cat(results, 1).permute(0, 2, 3, 1)


def with_center(module, y, projected, features):
    share = torch.nn.functional.linear(
        features,
        module.center_feature_scale_proj_weight,
        module.center_feature_scale_proj_bias,
    ).sigmoid()
    share = share.repeat_interleave(CHANNELS // share.shape[-1], -1)
    return y * (1 - share) + projected * share


def add_center(module, options) -> None:
    if options.get('center_scale'):
        groups = options['offset_groups']
        module.center_feature_scale_proj_weight = torch.nn.Parameter(
            torch.empty(groups, CHANNELS)
        )
        module.center_feature_scale_proj_bias = torch.nn.Parameter(torch.empty(groups))


def taps_of(options) -> int:
    return options.get('ksize', 3) ** 2 - options.get('remove_center', False)


def dcn_v3(options):
    groups, K = options['offset_groups'], taps_of(options)
    module = torch.nn.Module()
    norm = torch.nn.LayerNorm(CHANNELS, eps=1e-6)
    module.input_proj, module.output_proj = linear(CHANNELS), linear(CHANNELS)
    module.offset, module.mask = linear(groups * K * 2), linear(groups * K)
    ksize = options.get('dw_ksize', options.get('ksize', 3))
    module.dw_conv = torch.nn.Sequential(
        depthwise(ksize), torch.nn.Sequential(torch.nn.Identity(), norm)
    )
    add_center(module, options)

    def compute(x):
        n, _, h, w = x.shape
        features = module.dw_conv[0](x).permute(0, 2, 3, 1)
        features = torch.nn.functional.gelu(norm(features))
        projected = module.input_proj(x.permute(0, 2, 3, 1))
        offset = module.offset(features).reshape(n, h, w, groups, K, 2)
        mask = module.mask(features).reshape(n, h, w, groups, K).softmax(-1)
        y = core(projected, offset, mask, options)
        if options.get('center_scale'):
            y = with_center(module, y, projected, features)
        return module.output_proj(y).permute(0, 3, 1, 2)

    module.compute = compute
    return module


def dcn_v4(options):
    groups, K = options['offset_groups'], taps_of(options)
    module = torch.nn.Module()
    module.offset_mask = linear((groups * K * 3 + 7) // 8 * 8)
    if 'dw_ksize' in options:
        module.offset_mask_dw = depthwise(options['dw_ksize'])
    pointwise = options.get('pointwise', True)
    if pointwise:
        module.value_proj = linear(CHANNELS)
        module.output_proj = linear(CHANNELS, not options.get('output_nobias'))
    add_center(module, options)

    def compute(x):
        n, _, h, w = x.shape
        features = module.offset_mask_dw(x) if 'dw_ksize' in options else x
        packed = module.offset_mask(features.permute(0, 2, 3, 1))
        packed = packed[..., : groups * K * 3].reshape(n, h, w, groups, 3 * K)
        offset = packed[..., : 2 * K].reshape(n, h, w, groups, K, 2)
        projected = x.permute(0, 2, 3, 1)
        if pointwise:
            projected = module.value_proj(projected)
        y = core(projected, offset, packed[..., 2 * K :], options)
        if options.get('center_scale'):
            y = with_center(module, y, projected, y)
        return (module.output_proj(y) if pointwise else y).permute(0, 3, 1, 2)

    module.compute = compute
    return module


def detr(options):
    levels, heads, points = (options[key] for key in ('levels', 'heads', 'points'))
    module, samples = torch.nn.Module(), levels * heads * points
    module.sampling_offsets = linear(samples * 2)
    module.attention_weights = linear(samples)
    module.value_proj, module.output_proj = linear(CHANNELS), linear(CHANNELS)

    def compute(query, reference, value, padding_mask):
        n, q, _ = query.shape
        values = module.value_proj(value).masked_fill(padding_mask[..., None], 0)
        offset = module.sampling_offsets(query)
        offset = offset.reshape(n, q, heads, levels, points, 2)
        weights = module.attention_weights(query).reshape(n, q, heads, -1).softmax(-1)
        weights = weights.reshape(n, q, heads, levels, points)
        results = []
        for head in range(heads):
            channels = slice(head * CHANNELS // heads, (head + 1) * CHANNELS // heads)
            total, start = 0, 0
            for level, (h, w) in enumerate(SHAPES):
                image = values[:, start : start + h * w, channels]
                image = image.permute(0, 2, 1).reshape(n, -1, h, w)
                start += h * w
                place = reference[:, :, None, level]
                moved = offset[:, :, head, level]
                if place.shape[-1] == 2:
                    moved = moved / torch.tensor([w, h])
                else:
                    moved = moved / points * place[..., 2:] / 2
                x, y = (place[..., :2] + moved).unbind(-1)
                read = sample(image, x * w - 0.5, y * h - 0.5)
                total = total + (read * weights[:, None, :, head, level]).sum(-1)
            results.append(total)
        return module.output_proj(torch.cat(results, 1).permute(0, 2, 1))

    module.compute = compute
    return module


def mmcv(options):
    (out_h, out_w), bins = OUTSIZE, OUTSIZE[0] * OUTSIZE[1]
    module, relu = torch.nn.Module(), torch.nn.ReLU()
    module.offset_fc = torch.nn.Sequential(
        torch.nn.Linear(CHANNELS * bins, FC_SIZE),
        relu,
        torch.nn.Linear(FC_SIZE, FC_SIZE),
        relu,
        torch.nn.Linear(FC_SIZE, 2 * bins),
    )
    if options.get('modulated'):
        module.mask_fc = torch.nn.Sequential(
            torch.nn.Linear(CHANNELS * bins, FC_SIZE),
            relu,
            torch.nn.Linear(FC_SIZE, bins),
            torch.nn.Sigmoid(),
        )

    def pool(x, boxes, offset):
        """Each bin as a box of its own, which its offset moves."""
        index, x1, y1, x2, y2 = boxes.T
        width, height = x2 - x1, y2 - y1
        y = torch.empty(len(boxes), CHANNELS, out_h, out_w)
        for i in range(out_h):
            for j in range(out_w):
                left = x1 + width * (j / out_w + 0.1 * offset[:, 0, i, j])
                top = y1 + height * (i / out_h + 0.1 * offset[:, 1, i, j])
                right, bottom = left + width / out_w, top + height / out_h
                bin_ = torch.stack([index, left, top, right, bottom], 1)
                y[:, :, i, j] = torchvision.ops.roi_align(
                    x, bin_, 1, SCALE, sampling_ratio=2, aligned=True
                )[:, :, 0, 0]
        return y

    def compute(x, boxes):
        contents = pool(x, boxes, torch.zeros(len(boxes), 2, *OUTSIZE)).flatten(1)
        y = pool(x, boxes, module.offset_fc(contents).reshape(-1, 2, *OUTSIZE))
        if options.get('modulated'):
            y = y * module.mask_fc(contents).reshape(-1, 1, *OUTSIZE)
        return y

    module.compute = compute
    return module


if __name__ == '__main__':
    try:
        import torch
        import torchvision
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    make(sys.argv[1])
