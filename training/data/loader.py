"""Micro-batches in the order of the stream, made ahead by worker processes.

Micro-batch m of rank r in step b is a run of positions of the stream: the batch of the step is cut into as many equal
slices as there are ranks, each slice into micro-batches. All randomness of a sample is seeded by its position. So a
step has the same pictures, views and masks whatever the number of ranks, micro-batches and workers.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch

from training.config import ConfigError, Resolved
from training.data.augment import Views
from training.data.collate import Batch, Viewed, collate
from training.data.index import Index
from training.data.masks import plan_ratios
from training.data.samples import BadSample, DataError, Reader, decode_shortest_px

_VIEWS = 0x56  # purpose of randomness


class MicroBatches(torch.utils.data.Dataset[Batch | ConfigError]):
    """All micro-batches of one rank by number: step x num_micros + micro.

    Args:
        resolved: of the stage.
        index: the pictures.
        rank: of this process.
        world: number of processes.

    Raises:
        ConfigError: the batch cannot be cut that way.
    """

    def __init__(self, resolved: Resolved, index: Index, *, rank: int, world: int) -> None:
        self._resolved, self._index = resolved, index
        self._size, self.num_micros = micro_batches(resolved, world)
        self._first = rank * self._size * self.num_micros  # of this rank in a step
        gram = resolved.objective.gram
        gram_px = gram.global_px if gram.weight else None
        self._views = Views(resolved.views, gram_px=gram_px)
        self._shortest_px = decode_shortest_px(resolved.views, gram_px)
        side = resolved.views.global_px // resolved.model.patch_px
        self._grid = (side, side)
        self._reader: Reader | None = None

    def __getitem__(self, number: int) -> Batch | ConfigError:
        """A micro-batch, or what ends the run: an error that is raised in a worker arrives as another one."""
        try:
            return self._batch(*divmod(number, self.num_micros))
        except ConfigError as error:
            return error

    def _batch(self, step: int, micro: int) -> Batch:
        resolved = self._resolved
        if self._reader is None:  # in the worker
            self._reader = Reader(self._index, resolved.data, seed=resolved.seed, shortest_px=self._shortest_px)
        batch_size = resolved.data.batch_size
        first = self._first + micro * self._size  # in the step
        samples: list[Viewed] = []
        for position in range(step * batch_size + first, step * batch_size + first + self._size):
            decoded = self._reader.read(position)
            seeds = np.random.SeedSequence((resolved.seed % 2**64, _VIEWS, position))
            crops = self._views.draw(decoded.rgb, np.random.Generator(np.random.PCG64(seeds)))
            samples.append(Viewed(crops, position, decoded.key, decoded.bad))
        # Planned for the whole step, so that no slice of it is masked more than another on purpose.
        ratios = plan_ratios(2 * batch_size, seed=resolved.seed, step=step, config=resolved.masks)
        mine = ratios.reshape(2, batch_size)[:, first : first + self._size].flatten()
        return collate(samples, mine, self._grid, seed=resolved.seed, config=resolved.masks)


def micro_batches(resolved: Resolved, world: int) -> tuple[int, int]:
    """Pictures of a micro-batch, and micro-batches of a rank in a step.

    Raises:
        ConfigError: the batch is no multiple of them.
    """
    data = resolved.data
    if data.batch_size % world:
        raise ConfigError(f"data.batch_size {data.batch_size} must be a multiple of the number of processes, {world}")
    share = data.batch_size // world
    size = data.micro_batch_size or share
    if share % size:
        allowed = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise ConfigError(
            f"data.micro_batch_size {size} must divide the {share} pictures of a process in a step "
            f"(data.batch_size {data.batch_size} over {world}); allowed: {allowed}"
        )
    return size, share // size


class Loader:
    """The micro-batches of one rank, from one step on; an iterator, and a context that ends the workers.

    Args:
        resolved: of the stage.
        index: the pictures.
        rank: of this process.
        world: number of processes.
        start_step: the step to begin with: steps done so far.
        device: of the training; for CUDA, batches come in page-locked memory.

    Raises:
        ConfigError: the batch cannot be cut that way.
    """

    def __init__(
        self,
        resolved: Resolved,
        index: Index,
        *,
        rank: int,
        world: int,
        start_step: int,
        device: torch.device | None = None,
    ) -> None:
        made = MicroBatches(resolved, index, rank=rank, world=world)
        self.num_micros = made.num_micros
        data = resolved.data
        context = None
        if data.num_workers:
            # Not fork: this process has threads (of torch, of checkpoints, of a bucket's client). The server that
            # workers are forked from loads torch once for all of them.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch"])
        self._batches: Any = iter(
            torch.utils.data.DataLoader(
                made,
                batch_size=None,
                sampler=range(start_step * self.num_micros, resolved.num_steps * self.num_micros),
                collate_fn=_as_it_is,
                num_workers=data.num_workers,
                prefetch_factor=data.prefetch if data.num_workers else None,
                pin_memory=device is not None and device.type == "cuda",
                multiprocessing_context=context,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # else it draws from the generator of the training
            )
        )
        self._wait_s = 0.0
        self._bad: list[BadSample] = []

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch.

        Raises:
            DataError: too many pictures in a row cannot be read; a disk, a bucket or a worker fails.
            ConfigError: the pictures are no longer what they were when the run began.
        """
        if self._batches is None:
            raise StopIteration
        start = time.monotonic()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a worker of the loader is gone: {str(error).splitlines()[0]}") from None
        finally:
            self._wait_s += time.monotonic() - start
        if isinstance(batch, ConfigError):
            raise batch
        self._bad += batch.bad
        return cast(Batch, batch)

    def take_wait_s(self) -> float:
        """Seconds that the training waited for batches, since the last call."""
        taken, self._wait_s = self._wait_s, 0.0
        return taken

    def take_bad(self) -> list[BadSample]:
        """Pictures that could not be read, since the last call."""
        taken, self._bad = self._bad, []
        return taken

    def close(self) -> None:
        """End the workers."""
        self._batches = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(number: int) -> None:
    import pyarrow as pa

    pa.set_cpu_count(1)  # torch and OpenCV are held to one thread elsewhere
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training ends its workers
