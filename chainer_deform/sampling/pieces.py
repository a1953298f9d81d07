"""How work is cut into pieces, to bound the memory and to give threads their share."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from chainer_deform.sampling.threads import each


def shared_evenly(count: int, threads: int) -> bool:
    """Whether threads that share so many whole things have about as much to do."""
    return count % threads == 0 or count >= 4 * threads


def cut(length: int, most: int, threads: int = 1, unit: int = 1) -> list[slice]:
    """Cuts ``range(length)`` into slices of at most ``most``, all about as long.

    Few slices are as many as there are threads, or a multiple of them. A slice has a
    multiple of ``unit``, but for the last; that comes before all else.
    """
    count = max(1, -(-length // max(1, most)))
    if count < 4 * threads:
        count = -(-count // threads) * threads
    step = max(1, -(-length // (count * unit))) * unit
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def cut_tiles(
    images: slice, positions: int, most: int, threads: int = 1
) -> list[tuple[slice, slice]]:
    """Cuts images into tiles: slices of the images and of their output positions.

    A tile has at most ``most`` positions: those of several whole images, where images
    are small, else some of one image.
    """
    n = images.stop - images.start
    if positions <= most and shared_evenly(n, threads):
        return [
            (slice(images.start + i.start, images.start + i.stop), slice(0, positions))
            for i in cut(n, most // positions, threads)
        ]
    return [
        (slice(i, i + 1), part)
        for i in range(images.start, images.stop)
        for part in cut(positions, most, threads)
    ]


def contiguous(array):
    """The array, or a copy whose parts can be viewed in another shape; None is None."""
    if array is None or array.flags.c_contiguous:
        return array
    return array.copy('C')


def new_gradients(backend, wanted: Collection[str], arrays: Mapping) -> dict:
    """Memory for the gradients of those arrays that are wanted, by name."""
    return {
        name: backend.empty(array.shape, array.dtype)
        for name, array in arrays.items()
        if name in wanted
    }


class Images:
    """Images ``(n, c, h, w)`` channels last, as many at a time as there is memory for.

    Args:
        backend: The module that copies them.
        shape: Their shape.
        dtypes: What ``backend.dtypes`` returns.
        threads: How many threads share the work.

    """

    def __init__(self, backend, shape, dtypes, threads: int) -> None:
        self.backend, self.dtypes, self.threads = backend, dtypes, threads
        self.n, self.c, self.h, self.w = shape
        self.at_a_time = backend.batch_images(self.c * self.h * self.w, dtypes)

    def batches(self) -> list[slice]:
        """The images that are there at the same time."""
        return cut(self.n, self.at_a_time)

    def load(self, x, batch: slice):
        """A copy of some of ``x``; None if that is None."""
        if x is None:
            return None
        image = self.backend.new_image(x[batch], self.dtypes[0])
        self._each_part(lambda part: self.backend.load_image(x[batch], image, part))
        return image

    def new_gradient(self, gx, batch: slice):
        """Zeros for the gradient of such a copy; None if ``gx`` is None.

        They may be the memory that ``gx`` has for it.
        """
        if gx is None:
            return None
        return self.backend.new_gradient(gx[batch], self.dtypes[1])

    def store(self, gimage, gx, batch: slice) -> None:
        """Writes such a gradient to a contiguous ``gx``."""
        if gx is None:
            return
        gimage = self.backend.apart(gimage, gx)
        self._each_part(
            lambda part: self.backend.store_gradient(gimage, gx[batch], part)
        )

    def _each_part(self, work) -> None:
        each(work, cut(self.c, self.c, self.threads, unit=16), self.threads)
