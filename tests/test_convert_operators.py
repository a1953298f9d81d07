"""Conversion of the other operators' layers, compared with modules in torch."""

import chainer
import chainer.links as L
import numpy
import pytest

from chainer_deform.convert import (
    from_dcnv4,
    from_deformable_detr,
    from_internimage,
    from_mmcv,
    to_dcnv4,
    to_deformable_detr,
    to_internimage,
    to_mmcv,
)
from chainer_deform.links import (
    DCNv3,
    DCNv4,
    DeformablePSRoIPooling2D,
    DeformableRoIPooling2D,
    MultiScaleDeformableAttention,
)
from tests import operators_process
from tests.links.operators import randomize
from tests.operators_process import CASES, CHANNELS, FC_SIZE, OUTSIZE, SCALE, SHAPES
from tests.processes import run_with_torch

FUNCTIONS = {
    'internimage': (from_internimage, to_internimage),
    'dcnv4': (from_dcnv4, to_dcnv4),
    'detr': (from_deformable_detr, to_deformable_detr),
    'mmcv': (from_mmcv, to_mmcv),
}
every_case = pytest.mark.parametrize('name', CASES)
every_kind = pytest.mark.parametrize('kind', FUNCTIONS)


def make_link(name, in_channels=CHANNELS, **changed):
    kind, options = CASES[name]
    options = {**options, **changed}
    if kind == 'mmcv':
        return DeformableRoIPooling2D(
            in_channels, OUTSIZE, SCALE, 2, **{'fc_size': FC_SIZE, **options}
        )
    link_class = {
        'internimage': DCNv3,
        'dcnv4': DCNv4,
        'detr': MultiScaleDeformableAttention,
    }[kind]
    return link_class(in_channels, CHANNELS, **options)


def functions(name):
    return FUNCTIONS[CASES[name][0]]


def arrays_of(link):
    return {
        name: None if param.array is None else param.array.copy()
        for name, param in link.namedparams()
    }


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert (array is None) == (others[name] is None), name
        if array is not None:
            assert array.dtype == others[name].dtype, name
            numpy.testing.assert_array_equal(array, others[name], name)


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """Parameters, inputs and outputs of the modules, by case."""
    path = tmp_path_factory.mktemp('operators') / 'made.npz'
    run_with_torch(operators_process, path)
    return operators_process.read(path)


@every_case
def test_their_parameters_give_their_output(theirs, name):
    arguments, state = theirs[name]
    arguments = dict(arguments)
    expected = arguments.pop('y')
    assert abs(expected).max() > 0.5  # or any layer would do
    if name.startswith('detr'):
        arguments['shapes'] = SHAPES
    if name.startswith('mmcv'):
        boxes = arguments.pop('boxes')
        arguments['rois'] = boxes[:, [2, 1, 4, 3]]
        arguments['roi_indices'] = boxes[:, 0].astype(int)
    load, save = functions(name)
    for in_channels in CHANNELS, None:
        with chainer.using_config('dtype', numpy.dtype('float64')):
            link = make_link(name, in_channels)
            load(link, state)
        y = link(**arguments).array
        # In float64: there is room for nothing but rounding.
        numpy.testing.assert_allclose(y, expected, rtol=0, atol=1e-11)
        back = dict(state)
        for key in 'offset_mask.weight', 'offset_mask.bias':
            if key in state:
                back[key] = state[key].copy()
                back[key][len(link.offset_conv.b.array) :] = 0  # not used
        assert_same(save(link), back)


@every_case
def test_there_and_back(name):
    load, save = functions(name)
    link = randomize(make_link(name))
    for prefix in '', 'layers.0.':
        state = save(link, prefix=prefix)
        assert all(type(array) is numpy.ndarray for array in state.values())
        assert all(key.startswith(prefix) for key in state)
        state['another'] = None
        if not prefix:
            del state['another']
        for in_channels in CHANNELS, None:
            other = make_link(name, in_channels)
            load(other, state, prefix=prefix)
            assert_same(arrays_of(other), arrays_of(link))
    before = arrays_of(link)
    for array in state.values():
        if array is not None:
            array[...] = 7
    assert_same(arrays_of(link), before)
    assert_same(arrays_of(other), before)


def test_kernel_that_is_not_square():
    """Our taps row by row are 0 1 2 / 3 4 5 / ..., theirs go down the columns."""
    link = DCNv3(2, 2, (5, 3), offset_groups=1)
    link.mask_conv.b.array[...] = numpy.arange(15)
    link.offset_conv.b.array[...] = numpy.arange(30)
    state = to_internimage(link)
    column = numpy.arange(0, 15, 3)
    taps = numpy.concatenate([column, column + 1, column + 2])
    numpy.testing.assert_array_equal(state['mask.bias'], taps)
    numpy.testing.assert_array_equal(state['offset.bias'][::2], taps)
    numpy.testing.assert_array_equal(state['offset.bias'][1::2], taps + 15)


def test_attention_of_mmcv():
    link = randomize(make_link('detr'))
    other = make_link('detr', None)
    from_mmcv(other, to_mmcv(link, prefix='a.'), prefix='a.')
    assert_same(arrays_of(other), arrays_of(link))
    assert_same(to_mmcv(link), to_deformable_detr(link))


WRONG_OPTIONS = [
    (
        'internimage',
        {'offset_groups': 2},
        r"'mask.weight'\].*\(18, 6\), not \(27, 6\)|"
        r"'offset.weight'\].*\(36, 6\), not \(54, 6\)",
    ),
    ('internimage', {'dw_ksize': 5}, r'\(6, 1, 5, 5\), not \(6, 1, 3, 3\)'),
    (
        'internimage',
        {'center_scale': True},
        "lacks 'center_feature_scale_proj_bias', 'center_feature_scale_proj_weight'; "
        "without 'center_feature_scale_proj_weight' the link has to be made with "
        'center_scale=False$',
    ),
    ('internimage, centre', {'center_scale': False}, 'made with center_scale=True$'),
    ('internimage, centre', {'remove_center': False}, r'\(36, 6\), not \(32, 6\)'),
    ('dcnv4', {'offset_groups': 1}, r'\(32, 6\), not \(88, 6\)'),
    (
        'dcnv4',
        {'dw_ksize': 3},
        "without 'offset_mask_dw.weight' the link has to be made with dw_ksize=None$",
    ),
    ('dcnv4, centre', {'dw_ksize': None}, "mask_dw.weight' .* made with a dw_ksize$"),
    (
        'dcnv4',
        {'output_nobias': True},
        "; with 'output_proj.bias' the link has to be made with output_nobias=False$",
    ),
    ('dcnv4, centre', {'output_nobias': False}, 'made with output_nobias=True$'),
    ('dcnv4', {'pointwise': False}, "'value_proj.weight' .* made with pointwise=True"),
    (
        'dcnv4, no projections',
        {'pointwise': True},
        "without 'value_proj.weight' .* made with pointwise=False",
    ),
    ('detr', {'points': 2}, r"'sampling_offsets.weight'\].*\(24, 6\), not \(48, 6\)"),
    ('mmcv', {'modulated': True}, "without 'mask_fc.0.weight' .* modulated=False$"),
    ('mmcv, modulated', {'modulated': False}, "'mask_fc.0.weight' .* modulated=True$"),
    ('mmcv', {'fc_size': 9}, r"'offset_fc.0.weight'\].*\(9, 36\), not \(8, 36\)"),
]


@pytest.mark.parametrize('in_channels', [CHANNELS, None])
@pytest.mark.parametrize(('name', 'options', 'message'), WRONG_OPTIONS)
def test_link_of_other_options(name, options, message, in_channels):
    load, save = functions(name)
    state = save(make_link(name))
    link = make_link(name, in_channels, **options)
    before = arrays_of(link)
    with pytest.raises(ValueError, match=message):
        load(link, state)
    assert_same(arrays_of(link), before)


@every_kind
@pytest.mark.parametrize('in_channels', [CHANNELS, None])
def test_state_that_does_not_fit(kind, in_channels):
    """Whatever is wrong with whichever array, nothing is changed."""
    load, save = FUNCTIONS[kind]
    link = make_link(kind, in_channels)
    before, good = arrays_of(link), save(make_link(kind))
    for key, array in good.items():
        without = {k: a for k, a in good.items() if k != key}
        large = array.astype(float)
        large.flat[-1] = 1e39
        for state, error, message in (
            (without, ValueError, f"lacks '{key}'"),
            ({**without, f'x{key}': array}, ValueError, f"has 'x{key}' besides"),
            ({**good, key: array[:-1]}, ValueError, r'must have the shape .* not \('),
            ({**good, key: array[None]}, ValueError, r'must have the shape .* not \('),
            ({**good, key: array * 1j}, TypeError, 'must hold real numbers'),
            ({**good, key: large}, ValueError, r'has the number 1e\+39, which is too'),
        ):
            with pytest.raises(error, match=message):
                load(link, state)
            assert_same(arrays_of(link), before)
    for param in link.params():
        if param.array is not None:
            param.array.flags.writeable = False
            with pytest.raises(ValueError, match='of link must not be read-only'):
                load(link, good)
            param.array.flags.writeable = True
    load(link, good)


@every_kind
def test_arguments(kind):
    load, save = FUNCTIONS[kind]
    others = {
        'internimage': DCNv4(6, 6, offset_groups=2),
        'dcnv4': DCNv3(6, 6, offset_groups=2),
        'detr': L.Linear(3),
        'mmcv': DeformablePSRoIPooling2D(8, 2, 1.0, 2),
    }
    for link in others[kind], None:
        for call in lambda: load(link, {}), lambda: save(link):  # noqa: B023
            with pytest.raises(TypeError, match='^link must be a .* not a <class'):
                call()
    link = make_link(kind)
    with pytest.raises(TypeError, match='state_dict must be a mapping .* not a list'):
        load(link, [])
    for call in lambda: load(link, {}, prefix=3), lambda: save(link, prefix=3):
        with pytest.raises(TypeError, match='prefix must be a str, not 3'):
            call()
    with pytest.raises(ValueError, match='link is not initialised yet'):
        save(make_link(kind, None))


@pytest.mark.parametrize(
    ('load', 'save', 'link'),
    [
        (from_internimage, to_internimage, DCNv3(4, 6, offset_groups=2)),
        (from_dcnv4, to_dcnv4, DCNv4(4, 6, offset_groups=2)),
        (
            from_deformable_detr,
            to_deformable_detr,
            MultiScaleDeformableAttention(4, 6, heads=2),
        ),
    ],
)
def test_other_numbers_of_input_channels(load, save, link):
    late = link.copy('copy')
    late.in_channels = None  # as if its parameters had been initialised by a call
    for either in link, late:
        for call in lambda: load(either, {}), lambda: save(either):  # noqa: B023
            with pytest.raises(ValueError, match='in_channels=4 and out_channels=6$'):
                call()


def test_roi_pooling_of_any_number_of_channels():
    state = to_mmcv(make_link('mmcv'))
    link = make_link('mmcv', None)
    state['offset_fc.0.weight'] = state['offset_fc.0.weight'][:, :35]
    with pytest.raises(ValueError, match=r'must have the shape \(8, 30\), not \(8, 35'):
        from_mmcv(link, state)
    state['offset_fc.0.weight'] = state['offset_fc.0.weight'][0]
    message = r'must have the shape \(8, in_channels \* 6\), not \(35,\)'
    with pytest.raises(ValueError, match=message):
        from_mmcv(link, state)
