# Copyright 2026 The diffusers_gmem authors.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import datetime
import logging
import signal
from collections.abc import Iterator

import torch.distributed


logger = logging.getLogger(__name__)

# The main process encodes images, draws grids and measures distances alone
LONGEST_WAIT = datetime.timedelta(days=1)


class TrainingStopped(BaseException):
    """A signal came during work that loses nothing by being given up. Not an `Exception`: nobody handles it on the way."""


class StopRequest:
    """
    Inside this context, SIGTERM and SIGINT ask the training to stop instead of ending the process. Until [`begin`] is
    called they raise [`TrainingStopped`]. A second signal changes nothing, as launchers pass on what a terminal has already
    sent to everyone; SIGQUIT (Ctrl-\\) still ends the process.
    """

    def __init__(self):
        self.requested = False
        self._interruptible = True
        self._group: torch.distributed.ProcessGroup | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if not self.requested:
            logger.warning(f"Got {signal.Signals(number).name}: stopping as soon as nothing is lost by it.")
        self.requested = True
        if self._interruptible:
            self._interruptible = False
            raise TrainingStopped

    def begin(self) -> None:
        """From here on there is something to lose: a signal waits until somebody asks [`agreed`]."""
        self._interruptible = False

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """
        Work that may be given up at any moment.

        Raises:
            TrainingStopped: inside, when a signal comes, and at the start if one has come already.
        """
        self._interruptible = True
        try:
            if self.requested:
                raise TrainingStopped
            yield
        finally:
            self._interruptible = False

    def agreed(self) -> bool:
        """Whether any process was asked to stop. All processes must call it."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return self.requested
        if self._group is None:  # on the CPU, so that it does not wait for a GPU
            self._group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
        requested = torch.tensor(int(self.requested))
        torch.distributed.all_reduce(requested, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(requested)


def ignore_stop_signals(worker_id: int) -> None:
    """`worker_init_fn` of data loaders: who signals a whole group of processes does not take the data away."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
