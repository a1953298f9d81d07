"""Makes convolutions of a model deformable."""

from __future__ import annotations

import copy
import fnmatch

import chainer
import chainer.links as L

from chainer_deform.links import (
    DCNv3,
    DCNv4,
    DeformableConvolution2D,
    DeformablePSRoIPooling2D,
)

#: What can be replaced.
_CONVOLUTIONS = L.Convolution2D, L.DilatedConvolution2D
#: Layers that are not changed, nor are the links inside of them.
_DEFORMABLE = DeformableConvolution2D, DCNv3, DCNv4, DeformablePSRoIPooling2D
#: Options that the convolution decides.
_DECIDED = frozenset(
    {
        'in_channels',
        'out_channels',
        'ksize',
        'stride',
        'pad',
        'dilate',
        'groups',
        'deform_nobias',
        'deform_initialW',
        'deform_initial_bias',
    }
)


def deform_convolutions(
    model: chainer.Link, which, **options
) -> dict[str, DeformableConvolution2D]:
    """Makes convolutions of a model deformable, in place.

    Links :class:`~chainer.links.Convolution2D` and
    :class:`~chainer.links.DilatedConvolution2D` are replaced by deformable layers of
    the same kernel, stride, pad, dilation and groups, which take over filter and bias,
    the very parameters. New offset convolutions start at zero, so that the model's
    output stays the same. Files of the plain model can be loaded into the result, and
    the result can be saved as usual.

    Every place where the model or one of its links has the convolution, also in a list
    or dict of its own, has the layer afterwards. A model that has an optimizer goes on
    training: filter and bias keep their update rules with all state, and the new
    parameters get rules of the same kind. The papers train them with a tenth of the
    learning rate; see :func:`chainer_deform.optimizer_hooks.scale_updates`. Parameters
    that are not initialised stay so until the first call.

    Args:
        model (~chainer.Link): The model, on any device.
        which (str, callable or list): Which convolutions. A pattern such as
            ``'res5/*/conv2'`` for their paths in the model, in which ``*`` stands for
            any characters; a list of patterns or links; or a function of path and
            link that returns whether to replace it.
        options: Further options of
            :class:`~chainer_deform.links.DeformableConvolution2D`, such as
            ``modulated``, ``offset_groups`` or ``max_offset``. ``mask_scale`` is 2
            where not given, so that a modulated layer, too, starts with the same
            output.

    Returns:
        dict: The new layers, by path.

    Raises:
        TypeError: ``model`` is no link, ``which`` is of another type, or an option is
            one that the convolution decides.
        ValueError: ``which`` fits no convolution, or another kind of link; a
            convolution is in the model under several paths; or an option does not fit.

    After an error the model is unchanged.

    .. admonition:: Example

        >>> model = chainer.Sequential(
        ...     chainer.links.Convolution2D(3, 8, 3, pad=1), chainer.functions.relu,
        ...     chainer.links.Convolution2D(8, 8, 3, pad=1))
        >>> x = np.random.uniform(0, 1, (1, 3, 10, 14)).astype(np.float32)
        >>> before = model(x)
        >>> list(deform_convolutions(model, '1', modulated=True))
        ['1']
        >>> bool(abs(model(x).array - before.array).max() < 1e-5)
        True

    """
    if not isinstance(model, chainer.Link):
        raise TypeError(f'model must be a chainer.Link, not a {type(model).__name__}')
    found = _chosen(model, which)
    layers = {path: _deformable(path, link, options) for path, link in found.items()}
    # From here on nothing can fail.
    replaced: dict[int, object] = {id(c): layers[path] for path, c in found.items()}
    for path, link in found.items():
        _take_over(link, layers[path])
    for link in list(model.links()):
        attributes = vars(link)
        for name, value in attributes.items():
            attributes[name] = _with_layers(value, replaced)
    return layers


def _chosen(model: chainer.Link, which) -> dict[str, chainer.Link]:
    """The convolutions to replace, by path."""
    links = {path.lstrip('/'): link for path, link in model.namedlinks()}
    deformable = [
        f'{path}/' if path else ''
        for path, link in links.items()
        if isinstance(link, _DEFORMABLE)
    ]
    links = {
        path: link
        for path, link in links.items()
        if path and not f'{path}/'.startswith(tuple(deformable))
    }
    if callable(which) and not isinstance(which, chainer.Link):
        found = {path: link for path, link in links.items() if which(path, link)}
        if not found:
            raise ValueError('which is true of no link of the model')
    else:
        found = {}
        wanted = [which] if isinstance(which, (str, chainer.Link)) else which
        if not isinstance(wanted, (list, tuple)):
            raise TypeError(
                'which must be a pattern, a function, or a list of patterns or links, '
                f'not {which!r}'
            )
        for item in wanted:
            found.update(_fitting(item, links))
        if not found:
            raise ValueError('which must name at least one convolution')
    for path, link in found.items():
        if type(link) not in _CONVOLUTIONS:
            raise ValueError(
                f'{path!r} must be a Convolution2D or a DilatedConvolution2D to be '
                f'made deformable, not a {type(link).__name__}'
            )
        paths = [other for other, same in links.items() if same is link]
        if len(paths) > 1:
            raise ValueError(
                f'the convolution {path!r} is shared: the model has it under the paths '
                f'{", ".join(paths)}'
            )
    return found


def _fitting(item, links: dict) -> dict[str, chainer.Link]:
    """What one pattern or link of ``which`` stands for."""
    if isinstance(item, chainer.Link):
        found = {path: link for path, link in links.items() if link is item}
        if not found:
            raise ValueError(f'which has a link that the model does not have: {item}')
        return found
    if not isinstance(item, str):
        raise TypeError(f'which must have patterns or links, not {item!r}')
    # A pattern may fit other links beside, such as the blocks that have convolutions.
    found = {
        path: link
        for path, link in links.items()
        if 'convolution' in type(link).__name__.lower()
        or isinstance(link, _CONVOLUTIONS)
        if fnmatch.fnmatchcase(path, item.lstrip('/'))
    }
    if not found:
        known = [path for path, link in links.items() if type(link) in _CONVOLUTIONS]
        raise ValueError(
            f'which: {item!r} fits no convolution of the model, which has '
            f'{", ".join(known) or "none"}'
        )
    return found


def _deformable(path: str, conv, options: dict) -> DeformableConvolution2D:
    """A layer in the place of a convolution, with parameters of its own yet."""
    decided = _DECIDED & options.keys()
    if decided:
        raise TypeError(
            f'{", ".join(sorted(decided))} cannot be given: the convolution decides'
        )
    groups = getattr(conv, 'groups', 1)
    in_channels, dtype = getattr(conv, 'in_channels', None), chainer.config.dtype
    if conv.W.array is not None:
        in_channels, dtype = conv.W.shape[1] * groups, conv.W.dtype
    try:
        with chainer.using_config('dtype', dtype):
            layer = DeformableConvolution2D(
                in_channels,
                conv.out_channels,
                conv.ksize,
                conv.stride,
                conv.pad,
                dilate=conv.dilate,
                groups=groups,
                deform_nobias=conv.b is None,
                deform_initialW=0,
                **{'mask_scale': 2.0, **options},
            )
    except (TypeError, ValueError) as e:
        raise type(e)(f'{path!r} cannot be made deformable: {e}') from None
    layer.to_device(conv.device)
    return layer


def _take_over(conv, layer: DeformableConvolution2D) -> None:
    """Gives a layer the place, the parameters and the update rule of a convolution."""
    layer.name = conv.name
    for name in 'W', 'b':
        layer.deform_conv.__dict__[name] = getattr(conv, name)
    rule = conv.W.update_rule
    if rule is not None:
        for parameter in layer.offset_conv.params():
            parameter.update_rule = _fresh(rule)


def _fresh(rule: chainer.UpdateRule) -> chainer.UpdateRule:
    """A rule of the same kind, of the same optimizer, that has not updated yet."""
    fresh = copy.copy(rule)
    fresh.hyperparam = copy.copy(rule.hyperparam)
    # Hooks are shared, as add_hook of an optimizer shares them, but not their lists.
    hookable = fresh._hookable = copy.copy(rule._hookable)
    hookable._pre_update_hooks = hookable._pre_update_hooks.copy()
    hookable._post_update_hooks = hookable._post_update_hooks.copy()
    fresh._state = fresh._fp32_param = None
    fresh.t = 0
    return fresh


def _with_layers(value, found: dict[int, object]):
    """``value`` with the layers in the place of the convolutions.

    Lists and dicts stay the same objects. ``found`` has what stands for an object, by
    its id; what has been gone through is added, as a list may be in itself.
    """
    if id(value) in found:
        return found[id(value)]
    if isinstance(value, (list, dict)):
        found[id(value)] = value
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            value[key] = _with_layers(item, found)
    elif type(value) is tuple:
        return tuple(_with_layers(item, found) for item in value)
    return value
