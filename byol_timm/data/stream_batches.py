"""Training batches of a stream, whose order is a function of the seed and the step."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ByolTimmError
from .batches import Batch, Batches
from .decoding import BadImage, Reduction, decode
from .images import Images
from .sampling import epoch_order
from .streams import Stream, open_content

# Parts of the stream that are read in parallel, and divided among processes.
MAX_LANES = 64
# Seconds to wait for data of the shards.
TIMEOUT = 600.0
# The numbers of rows, and the encoded images in them.
Rows = list[tuple[int, bytes | None]]


@dataclass(kw_only=True, eq=False)
class StreamBatches(Batches):
    """Batches of a stream.

    An epoch permutes the shards, takes as many images in sequence as fill global batches, from a random start, and
    cuts them into lanes of equal length. The number of lanes is a power of two that divides the global batch, at most
    64 and at most the number of shards; 1 if the rows of shards are unknown. Images are permuted within blocks of a
    lane, of `shuffle_buffer` images over all lanes. The global batch of a step has equally many images of each lane,
    lane after lane, and processes take their slices of it as in `TrainingBatches`, whatever their number.
    A process reads the lanes of its slices and keeps a block of each in memory, encoded. An image that cannot be read
    is replaced by one of `bank` that its ordinal chooses, and noted in `bad`; too many raise `ByolTimmError`.
    """

    stream: Stream = field(kw_only=False)
    bank: Images = field(kw_only=False)
    shuffle_buffer: int = 10_000

    def __post_init__(self) -> None:
        self._check(self.stream.name, len(self.stream))
        self.lanes = 1
        while self.stream.has_counts and 2 * self.lanes <= min(MAX_LANES, len(self.stream.shards)):
            if self.global_batch % (2 * self.lanes):
                break
            self.lanes *= 2

    def _batches(self) -> Generator[Batch]:
        # Half as many images are read ahead as are held in blocks.
        ahead = _read_ahead(self._requests(), max(2, self.shuffle_buffer // (2 * self.world * self.batch_size)))
        with contextlib.closing(ahead):
            yield from self._read(_RowOrSpare(self.stream, self.bank, self.seed), self.bank, ahead)

    def _requests(self) -> Iterator[tuple[Tensor, Rows]]:
        """Yield ordinals and rows of every micro-batch of this process."""
        n, width, steps = len(self.stream), self.global_batch // self.lanes, len(self.stream) // self.global_batch
        slices = [range(self.global_batch)[start:][: self.batch_size] for start in self._starts()]
        mine = sorted({place // width for places in slices for place in places})
        for step in itertools.count(self.start_step):
            epoch, done = divmod(step, steps)
            if done == 0 or step == self.start_step:
                lanes = {lane: self._lane(epoch, lane, steps * width, done * width) for lane in mine}
            rows: dict[int, tuple[int, bytes | None]] = {}
            for lane in mine:
                rows |= enumerate(itertools.islice(lanes[lane], width), lane * width)
            for places in slices:
                ordinals = torch.tensor(places) + done * self.global_batch + epoch * n
                yield ordinals, [rows[place] for place in places]

    def _starts(self) -> range:
        """Return where in a global batch the micro-batches of this process start."""
        return range(self.rank * self.batch_size, self.global_batch, self.world * self.batch_size)

    def _lane(self, epoch: int, lane: int, length: int, start: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield the rows of a lane in that epoch, `length` in all, from `start` on."""
        block = max(1, self.shuffle_buffer // self.lanes)
        first = start - start % block
        unused = len(self.stream) % self.global_batch
        skipped = np.random.default_rng((self.seed % 2**64, epoch, 1 + MAX_LANES)).integers(unused + 1)
        begins = int(skipped) + lane * length
        shards = epoch_order(self.seed, epoch, len(self.stream.shards)).numpy()
        rows = self.stream.rows(shards, begins + first)
        for begin in range(first, length, block):
            held = list(itertools.islice(rows, min(block, length - begin)))
            if len(held) < min(block, length - begin):
                found = begins + begin + len(held) + self.stream.held_out
                raise ByolTimmError(
                    f"{self.stream.name} ended after {found} images. Start a new run with --num_images {found}"
                )
            order = np.random.default_rng((self.seed % 2**64, epoch, 1 + lane, begin)).permutation(len(held))
            # From the end, so that each image is freed once it is used.
            held = [held[place] for place in order[max(0, start - begin) :][::-1]]
            while held:
                yield held.pop()


def _read_ahead(items: Iterable[Any], depth: int) -> Generator[Any]:
    """Yield the same items, which a thread reads up to `depth` in advance."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    ended = threading.Event()

    def put(item: Any, error: BaseException | None = None) -> None:
        while not ended.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put((item, error), timeout=0.1)

    def read() -> None:
        try:
            for item in items:
                put(item)
                if ended.is_set():
                    return
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get(timeout=TIMEOUT)
            if error is not None:
                raise error
            yield item
    except queue.Empty:
        raise ByolTimmError(f"no data from the shards for {TIMEOUT:.0f} s. Check the connection") from None
    finally:
        ended.set()
        thread.join(timeout=5)


class _RowOrSpare:
    """Find the image of a row, or one of the bank that the seed and the ordinal choose."""

    def __init__(self, stream: Stream, bank: Images, seed: int) -> None:
        self.stream, self.bank, self.seed = stream, bank, seed

    def __call__(
        self, ordinal: int, row: tuple[int, bytes | None], reduction: Reduction | None, bad: dict[int, str]
    ) -> tuple[Tensor, bool]:
        number, content = row
        try:
            pixels = decode(open_content(content), self.stream.channels, reduction, self.stream.value_range)
            return torch.from_numpy(pixels), True
        except BadImage as reason:
            bad[number] = f"{self.stream.describe(number)}: {reason}"
        # At least one image of the bank could be read before.
        place = int(np.random.default_rng((self.seed % 2**64, ordinal)).integers(len(self.bank)))
        while True:
            with contextlib.suppress(BadImage):
                return self.bank.decode(place % len(self.bank)), False
            place += 1
