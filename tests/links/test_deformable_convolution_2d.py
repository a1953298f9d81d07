import copy
import pickle

import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer import serializers
from chainer.utils.type_check import InvalidType

from chainer_deform.link_hooks import SamplingHook
from chainer_deform.links import DeformableConvolution2D, DeformableConvolution2DSampler

x = numpy.random.RandomState(0).uniform(-1, 1, (2, 6, 9, 8)).astype('f')
normal = chainer.initializers.Normal(0.3)


def make_layer(in_channels=6, **options):
    """An asymmetric layer whose offsets are not zero."""
    return DeformableConvolution2D(
        in_channels,
        4,
        (3, 2),
        **{
            'stride': (2, 1),
            'pad': (1, 2),
            'dilate': (1, 2),
            'groups': 2,
            'offset_groups': 3,
            'modulated': True,
            'offset_initialW': normal,
            **options,
        },
    )


def arrays_of(link):
    return {name: param.array for name, param in link.namedparams()}


def assert_same_parameters(link, other):
    assert arrays_of(link).keys() == arrays_of(other).keys()
    for name, array in arrays_of(link).items():
        numpy.testing.assert_array_equal(array, arrays_of(other)[name], name)


class TestLikeChainersOwn:
    def test_names_order_and_shapes_of_the_parameters(self):
        for options in {}, {'offset_nobias': True}, {'deform_nobias': True}:
            ours = DeformableConvolution2D(3, 5, (3, 2), **options)
            chainers = L.DeformableConvolution2D(3, 5, (3, 2), **options)
            assert [(name, param.shape) for name, param in ours.namedparams()] == [
                (name, param.shape) for name, param in chainers.namedparams()
            ]

    def test_all_arguments_by_position(self):
        arguments = (
            6,
            4,
            (3, 2),
            (2, 1),
            (1, 0),
            True,
            normal,
            None,
            False,
            chainer.initializers.Normal(0.2),
            chainer.initializers.Constant(3),
        )
        layers = []
        for layer_class in DeformableConvolution2D, L.DeformableConvolution2D:
            numpy.random.seed(0)
            layers.append(layer_class(*arguments))
        assert_same_parameters(*layers)
        ours, chainers = (layer(x).array for layer in layers)
        numpy.testing.assert_allclose(ours, chainers, atol=1e-4)

    def test_file_of_chainers_layer_gives_the_same_output(self, tmp_path):
        numpy.random.seed(0)
        chainers = L.DeformableConvolution2D(
            6,
            4,
            3,
            stride=2,
            pad=1,
            offset_initialW=normal,
            deform_initialW=normal,
            deform_initial_bias=chainer.initializers.Normal(1),
        )
        serializers.save_npz(tmp_path / 'chainer.npz', chainers)
        for in_channels in 6, None:
            ours = DeformableConvolution2D(in_channels, 4, 3, stride=2, pad=1)
            serializers.load_npz(tmp_path / 'chainer.npz', ours)
            assert_same_parameters(ours, chainers)
            numpy.testing.assert_allclose(ours(x).array, chainers(x).array, atol=1e-4)

    @pytest.mark.parametrize(
        'initializers',
        [
            {'offset_initialW': 0.5, 'deform_initialW': 2},
            {
                'offset_initial_bias': numpy.arange(36, dtype='f'),
                'deform_initial_bias': 1,
            },
            {'deform_initialW': numpy.arange(4 * 6 * 9, dtype='f').reshape(4, 6, 3, 3)},
            {
                'offset_initialW': numpy.arange(18 * 6 * 9, dtype='f').reshape(
                    18, 6, 3, 3
                ),
                'deform_initial_bias': numpy.arange(4, dtype='f'),
            },
        ],
    )
    def test_initialisers(self, initializers):
        options = {'offset_initial_bias': 0, **initializers}
        if not isinstance(options['offset_initial_bias'], int):
            options['offset_initial_bias'] = options['offset_initial_bias'][:18]
        ours = DeformableConvolution2D(6, 4, 3, **options)
        given = {
            '/offset_conv/W': 0,
            '/offset_conv/b': 0,
            '/deform_conv/b': 0,
            **{
                f'/{name.split("_")[0]}_conv/{name[-1].replace("s", "b")}': value
                for name, value in options.items()
            },
        }
        for name, value in given.items():
            array = arrays_of(ours)[name]
            numpy.testing.assert_array_equal(
                array, numpy.broadcast_to(value, array.shape)
            )


class TestDefaults:
    @pytest.mark.parametrize('options', [{}, {'modulated': True, 'mask_scale': 2}])
    def test_begins_as_a_plain_convolution(self, options):
        layer = DeformableConvolution2D(6, 4, 3, stride=2, pad=1, groups=2, **options)
        conv = layer.deform_conv
        expected = F.convolution_2d(x, conv.W, conv.b, stride=2, pad=1, groups=2).array
        assert numpy.abs(expected).max() > 0.1
        numpy.testing.assert_allclose(layer(x).array, expected, atol=1e-5)

    def test_modulated_begins_with_half_the_mask(self):
        layer = DeformableConvolution2D(6, 4, 3, modulated=True)
        expected = 0.5 * F.convolution_2d(x, layer.deform_conv.W).array
        numpy.testing.assert_allclose(layer(x).array, expected, atol=1e-5)

    def test_offsets_learn_from_the_first_step(self):
        """With Chainer's own defaults their first gradient is zero."""
        layer = DeformableConvolution2D(6, 4, 3, pad=1)
        layer.cleargrads()
        F.sum(layer(x) ** 2).backward()
        assert numpy.abs(layer.offset_conv.W.grad).max() > 1e-3

    def test_filter_starts_as_that_of_a_convolution(self):
        ours = DeformableConvolution2D(32, 64, 3, groups=2).deform_conv.W.array
        chainers = L.Convolution2D(32, 64, 3, groups=2).W.array
        assert ours.shape == chainers.shape
        assert ours.std() == pytest.approx(chainers.std(), rel=0.05)


class TestModulated:
    def test_mask_is_predicted_through_a_sigmoid(self):
        numpy.random.seed(0)
        layer = make_layer(mask_scale=1.5)
        predicted = layer.offset_conv(x)
        assert predicted.shape[1] == 3 * 3 * 6
        offset, mask = predicted[:, :36], 1.5 * F.sigmoid(predicted[:, 36:])
        numpy.testing.assert_array_equal(
            layer(x).array, layer.deform_conv(x, offset, mask).array
        )

    def test_every_parameter_gets_a_gradient(self):
        layer = make_layer()
        layer.cleargrads()
        F.sum(layer(x) ** 2).backward()
        for name, param in layer.namedparams():
            assert numpy.abs(param.grad).max() > 0, name


class TestBoundedOffsets:
    def test_formula(self):
        numpy.random.seed(0)
        layer = make_layer(max_offset=1.5)
        layer.offset_conv.W.array *= 20
        predicted = layer.offset_conv(x)
        assert numpy.abs(predicted[:, :36].array).max() > 3
        offset = 1.5 * F.tanh(predicted[:, :36] / 1.5)
        expected = layer.deform_conv(x, offset, F.sigmoid(predicted[:, 36:]))
        numpy.testing.assert_allclose(layer(x).array, expected.array, atol=1e-6)

    @pytest.mark.parametrize('modulated', [False, True])
    def test_what_is_recorded_is_bounded(self, modulated):
        layer = make_layer(max_offset=0.5, modulated=modulated)
        layer.offset_conv.W.array *= 1000
        with SamplingHook(layer) as hook:
            layer(x)
        (call,) = hook.calls
        assert 0.499 < numpy.abs(call.offset).max() <= 0.5

    def test_no_bound_is_the_default(self):
        layer = make_layer(modulated=False)
        expected = layer.deform_conv(x, layer.offset_conv(x)).array
        numpy.testing.assert_array_equal(layer(x).array, expected)


class TestOffsetInput:
    @pytest.mark.parametrize('options', [{}, {'in_channels': None}])
    def test_offsets_come_from_it(self, options):
        numpy.random.seed(0)
        layer = make_layer(**options, offset_in_channels=2)
        feature = numpy.random.uniform(-1, 1, (2, 2, 9, 8)).astype('f')
        predicted = layer.offset_conv(feature)
        assert layer.offset_conv.W.shape[1] == 2
        expected = layer.deform_conv(x, predicted[:, :36], F.sigmoid(predicted[:, 36:]))
        y = layer(x, offset_input=feature)
        numpy.testing.assert_array_equal(y.array, expected.array)

    def test_gradients(self):
        layer = make_layer(offset_in_channels=2)
        feature = numpy.random.uniform(-1, 1, (2, 2, 9, 8)).astype('f')
        variables = chainer.Variable(x), chainer.Variable(feature)
        F.sum(layer(*variables) ** 2).backward()
        for variable in variables:
            assert numpy.abs(variable.grad).max() > 0.01

    def test_errors(self):
        layer = make_layer(offset_in_channels=2)
        for shape in (2, 3, 9, 8), (1, 2, 9, 8), (2, 2, 9, 9), (2, 9, 8):
            with pytest.raises(InvalidType) as caught:
                layer(x, numpy.zeros(shape, 'f'))
            message = str(caught.value)
            assert 'offset_input.shape == (2, 2, 9, 8)' in message
            assert f'offset_input.shape == {shape}' in message


class TestLink:
    def test_sampler_alone(self):
        layer = DeformableConvolution2DSampler(None, 4, 3, pad=1, nobias=True)
        assert layer.W.array is None
        offset = numpy.zeros((2, 18, 9, 8), 'f')
        y = layer(x, offset)
        assert layer.W.shape == (4, 6, 3, 3)
        assert layer.b is None
        half = layer(x, offset, numpy.full((2, 9, 9, 8), 0.5, 'f'))
        numpy.testing.assert_allclose(half.array, y.array / 2, atol=1e-6)

    def test_initialises_at_the_first_call(self):
        layer = make_layer(None)
        assert layer.offset_conv.W.array is None
        assert layer.deform_conv.W.array is None
        layer(x)
        assert layer.offset_conv.W.shape == (54, 6, 3, 2)
        assert layer.deform_conv.W.shape == (4, 3, 3, 2)

    @pytest.mark.parametrize('modulated', [False, True])
    def test_copies(self, modulated):
        layer = make_layer(modulated=modulated)
        expected = layer(x).array
        for other in (
            layer.copy(),
            layer.copy('copy'),
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
        ):
            numpy.testing.assert_array_equal(other(x).array, expected)
        again = layer.copy('init')
        assert (
            numpy.abs(again.deform_conv.W.array - layer.deform_conv.W.array).max() > 0
        )

    @pytest.mark.parametrize('in_channels', [6, None])
    @pytest.mark.parametrize('kind', ['npz', 'hdf5'])
    def test_serializes(self, kind, in_channels, tmp_path):
        layer = make_layer()
        getattr(serializers, f'save_{kind}')(tmp_path / f'layer.{kind}', layer)
        other = make_layer(in_channels)
        getattr(serializers, f'load_{kind}')(tmp_path / f'layer.{kind}', other)
        assert_same_parameters(layer, other)
        numpy.testing.assert_array_equal(layer(x).array, other(x).array)

    @pytest.mark.parametrize('in_channels', [6, None])
    @pytest.mark.parametrize('nobias', [False, True])
    @pytest.mark.parametrize('kind', ['npz', 'hdf5'])
    def test_loads_files_of_a_plain_convolution(
        self, kind, nobias, in_channels, tmp_path
    ):
        options = {'stride': (2, 1), 'pad': (1, 2), 'groups': 2, 'dilate': (1, 2)}
        plain = chainer.Sequential(
            L.Convolution2D(6, 4, (3, 2), nobias=nobias, **options), F.relu
        )
        getattr(serializers, f'save_{kind}')(tmp_path / f'plain.{kind}', plain)
        model = chainer.Sequential(
            DeformableConvolution2D(
                in_channels, 4, (3, 2), deform_nobias=nobias, **options
            ),
            F.relu,
        )
        getattr(serializers, f'load_{kind}')(tmp_path / f'plain.{kind}', model)
        numpy.testing.assert_allclose(model(x).array, plain(x).array, atol=1e-5)
        # What it writes is its own.
        getattr(serializers, f'save_{kind}')(tmp_path / f'own.{kind}', model)
        getattr(serializers, f'load_{kind}')(tmp_path / f'own.{kind}', model)

    def test_repeats(self):
        layer = DeformableConvolution2D(6, 6, 3, pad=1)
        for mode in 'init', 'copy', 'share':
            model = layer.repeat(2, mode)
            assert model(x).shape == x.shape
            first, second = (link.deform_conv.W.array for link in model)
            assert (numpy.abs(first - second).max() == 0) == (mode != 'init')

    def test_clears_gradients(self):
        layer = make_layer()
        for _ in range(2):
            layer.cleargrads()
            assert all(param.grad is None for param in layer.params())
            F.sum(layer(x)).backward()
            assert all(param.grad is not None for param in layer.params())

    @pytest.mark.parametrize('in_channels', [6, None])
    def test_moves_between_devices(self, in_channels):
        """To a stand-in for a device, where every array is of another class."""

        class There(numpy.ndarray):
            pass

        class Device(chainer.backend.CpuDevice):
            __hash__ = object.__hash__

            def __eq__(self, other):
                return self is other

            def send(self, arrays):
                return arrays.copy().view(There)

        layer, device = make_layer(in_channels), Device()
        if in_channels:
            expected = layer(x).array
        layer.to_device(device)
        assert {link.device for link in layer.links()} == {device}
        if not in_channels:
            layer(x)  # initialises the parameters, on the device
        else:
            for conv in layer.offset_conv, layer.deform_conv:
                assert isinstance(conv.W.array, There)
                assert isinstance(conv.b.array, There)
            numpy.testing.assert_array_equal(layer(x).array, expected)
        for conv in layer.offset_conv, layer.deform_conv:
            assert conv.W.device is conv.b.device is device
        layer.to_device('@numpy')
        for name, array in arrays_of(layer).items():
            assert array.dtype == numpy.float32, name
        assert {link.device.name for link in layer.links()} == {'@numpy'}

    def test_half_precision(self):
        with chainer.using_config('dtype', numpy.float16):
            layer = make_layer()
        assert {param.dtype for param in layer.params()} == {numpy.dtype('float16')}
        assert layer(x.astype('float16')).dtype == numpy.float16

    def test_trains(self):
        layer = make_layer()
        target = numpy.random.RandomState(1).uniform(-1, 1, layer(x).shape).astype('f')
        optimizer = chainer.optimizers.Adam(0.01).setup(layer)
        losses = []
        for _ in range(20):
            loss = F.mean_squared_error(layer(x), target)
            losses.append(float(loss.array))
            layer.cleargrads()
            loss.backward()
            optimizer.update()
        assert losses[-1] < 0.8 * losses[0]

    def test_describes_itself(self):
        layer = make_layer(max_offset=2)
        assert (
            repr(layer)
            == str(layer)
            == (
                'DeformableConvolution2D(in_channels=6, out_channels=4, ksize=(3, 2), '
                'stride=(2, 1), pad=(1, 2), dilate=(1, 2), groups=2, offset_groups=3, '
                'nobias=False, modulated=True, mask_scale=1.0, max_offset=2.0)'
            )
        )
        assert repr(layer.deform_conv).startswith('DeformableConvolution2DSampler(in_')


class TestErrors:
    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            ({'ksize': 0}, ValueError, 'ksize must be at least 1'),
            ({'ksize': 2.5}, TypeError, 'ksize must be an int'),
            ({'stride': (1, 0)}, ValueError, 'stride must be at least 1'),
            ({'pad': -1}, ValueError, 'pad must be at least 0'),
            ({'dilate': 'a'}, TypeError, 'dilate must be an int'),
            ({'dilate': True}, TypeError, 'dilate must be an int .*, not True'),
            ({'groups': True}, TypeError, 'groups must be an int, not True'),
            (
                {'groups': 4},
                ValueError,
                'groups must divide the number of input channels',
            ),
            (
                {'out_channels': 5, 'groups': 2},
                ValueError,
                '.* number of output channels',
            ),
            ({'offset_groups': 4}, ValueError, 'offset_groups must divide'),
            ({'in_channels': 0}, ValueError, 'in_channels must be at least 1'),
            ({'out_channels': 0}, ValueError, 'out_channels must be at least 1'),
            ({'out_channels': None}, TypeError, 'out_channels must be an int'),
            ({'in_channels': '3'}, TypeError, 'in_channels must be an int'),
        ],
    )
    @pytest.mark.parametrize(
        'layer', [DeformableConvolution2D, DeformableConvolution2DSampler]
    )
    def test_option(self, layer, options, error, message):
        with pytest.raises(error, match='^' + message):
            layer(**{'in_channels': 6, 'out_channels': 4, 'ksize': 3, **options})

    def test_channels_at_the_first_call(self):
        layer = DeformableConvolution2DSampler(None, 4, 3, groups=4, pad=1)
        with pytest.raises(ValueError, match='groups must divide'):
            layer(x, numpy.zeros((2, 18, 9, 8), 'f'))

    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            (
                {'modulated': 'yes'},
                TypeError,
                "modulated must be True or False, .*'yes'",
            ),
            ({'modulated': 1}, TypeError, 'modulated must be True or False, not 1'),
            ({'max_offset': 0}, ValueError, 'max_offset must be above 0 .*, not 0'),
            ({'max_offset': -1.0}, ValueError, 'max_offset must be above 0'),
            ({'max_offset': float('inf')}, ValueError, 'max_offset must be .* finite'),
            ({'max_offset': float('nan')}, ValueError, 'max_offset must be above 0'),
            ({'max_offset': '2'}, TypeError, "max_offset must be a number, not '2'"),
            ({'max_offset': True}, TypeError, 'max_offset must be a number, not True'),
            ({'offset_in_channels': 0}, ValueError, 'offset_in_channels must be at'),
        ],
    )
    def test_option_of_the_layer(self, options, error, message):
        with pytest.raises(error, match='^' + message):
            DeformableConvolution2D(6, 4, 3, **options)

    @pytest.mark.parametrize(
        ('images', 'error', 'message'),
        [
            (x[0], InvalidType, r'x\.shape == \(n, 6, h, w\)\n.*\(6, 9, 8\)'),
            (x[:, :4], InvalidType, r'x\.shape == \(n, 6, h, w\)\n.*\(2, 4, 9, 8\)'),
            (x.tolist(), TypeError, 'x must be a Variable or an array, not a list'),
            ((255 * x).astype('uint8'), InvalidType, r'x\.dtype == uint8'),
        ],
    )
    def test_input(self, images, error, message):
        with pytest.raises(error, match=message):
            make_layer()(images)

    def test_wrong_number_of_offsets_says_the_rule(self):
        layer = DeformableConvolution2DSampler(6, 4, 3, pad=1, offset_groups=2)
        rule = r'offset\.shape == \(2, 36, 9, 8\) with 2 \* kh \* kw \* offset_groups'
        with pytest.raises(InvalidType, match=rule) as caught:
            layer(x, numpy.zeros((2, 18, 9, 8), 'f'))
        assert 'mask' not in str(caught.value)
        with pytest.raises(InvalidType, match=rule + '(.|\n)*mask, split it off'):
            layer(x, numpy.zeros((2, 54, 9, 8), 'f'))
