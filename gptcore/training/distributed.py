"""The processes of a run, started by torchrun: what they exchange, and which of them ended when one fails.

Tensors travel by gloo on CPUs and by NCCL on GPUs. Control data travels by gloo always: the host never waits for a GPU
to exchange it, and gloo notices the end of a process by its closed connection.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")
BUCKET = 1 << 25  # bytes of a message, unless one tensor is larger
GRACE = 3.0  # seconds in which a process that closed its connections ends


class ProcessGroupError(RuntimeError):
    """Another process of the run failed or ended; the message names its rank."""


class Processes:
    """The processes of a run. `rank` is the number of this one, from 0; `count` is 1 without torchrun."""

    def __init__(self, rank: int, count: int, control: Any) -> None:
        self.rank, self.count, self._control = rank, count, control
        here = (socket.gethostname(), os.getpid())
        self._places: list[tuple[str, int]] = self.share(here)

    def share(self, value: Result) -> list[Result]:
        """Return the values that the processes pass, by rank; they are pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._naming_failures():
            dist.all_gather_object(values, value, group=self._control)
        return values

    def gather(self, row: Sequence[int]) -> list[list[int]]:
        """Return the whole numbers that the processes pass, equally many each, by rank."""
        if self.count == 1:
            return [list(row)]
        mine = torch.tensor(row, dtype=torch.int64, device="cpu")
        rows = [torch.empty_like(mine) for _ in range(self.count)]
        with self._naming_failures():
            dist.all_gather(rows, mine, group=self._control)
        return [row.tolist() for row in rows]

    @contextlib.contextmanager
    def one_speaks(self) -> Iterator[None]:
        """Let the process of rank 0 alone print and warn; the others would do the same."""
        with contextlib.ExitStack() as stack:
            if self.rank > 0:
                stack.enter_context(contextlib.redirect_stdout(None))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield

    def block(self, count: int, rank: int | None = None) -> range:
        """Return which of `count` micro-batches a process takes, by default this one."""
        rank = self.rank if rank is None else rank
        return range(rank * count // self.count, (rank + 1) * count // self.count)

    def first(self, function: Callable[[], Result], serve: Callable[[Any], None] | None = None) -> Result:
        """Call function in the process of rank 0; return its result, which is pickled, or raise its error, in all.

        In the other processes the error is a ProcessGroupError. serve: is called there with what function asks for.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None, None]
        raised: BaseException | None = None
        if self.rank == 0:
            try:
                outcome[0] = function()
            except BaseException as error:
                raised, outcome[1] = error, f"rank 0 failed: {type(error).__name__}: {error}"
        with self._naming_failures() if raised is None else contextlib.suppress(RuntimeError):
            dist.broadcast_object_list(outcome, src=0, group=self._control)
            while self.rank > 0 and outcome[2] is not None:
                assert serve is not None
                serve(outcome[2])
                dist.broadcast_object_list(outcome, src=0, group=self._control)
        if raised is not None:
            raise raised
        if outcome[1] is not None:
            raise ProcessGroupError(outcome[1])
        result: Result = outcome[0]
        return result

    def ask(self, request: Any) -> None:
        """Have the other processes serve a request, which is pickled; in a function that `first` calls."""
        with self._naming_failures():
            dist.broadcast_object_list([None, None, request], src=0, group=self._control)

    def after_first(self, function: Callable[[], Result]) -> Result:
        """Return function() of each process, called in rank 0 before the others, which find what it has cached."""
        made: list[Result] = []
        self.first(lambda: made.append(function()))
        return made[0] if made else function()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0; not those of which each process has a part."""
        for tensor in tensors if self.count > 1 else ():
            if hasattr(tensor, "to_local"):
                continue
            dense = tensor.detach().contiguous()
            with self._naming_failures():
                dist.broadcast(dense, src=0)
            if dense.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(dense)

    def add(self, flat: Tensor) -> None:
        """Replace a tensor by the sum of those of all processes, in the order that the backend chooses."""
        with self._naming_failures():
            dist.all_reduce(flat)

    def add_in_tree(self, rows: Tensor, nodes: Sequence[tuple[int, bool]]) -> Tensor:
        """Return the sum of the rows of all processes, in all of them, added as nodes of a `Tree`.

        nodes: of each row of each process its leaves, and whether it counts; a process has equally many rows.
        Each process adds up one part of the columns, as in a ring all-reduce, so as many bytes are sent with one row.
        """
        height, width = rows.shape
        size = -(-width // self.count)
        padded = rows.new_zeros(height, size * self.count)
        padded[:, :width] = rows
        sent = padded.view(height, self.count, size).transpose(0, 1).contiguous()  # [to which process, row]
        received = torch.empty_like(sent)
        with self._naming_failures():
            dist.all_to_all_single(received, sent)
        tree: Tree[Tensor] = Tree(Tensor.add_)
        for (leaves, counts), row in zip(nodes, received.view(-1, size), strict=True):
            if leaves:
                tree.push(row if counts else None, leaves)
        total = tree.total()
        assert total is not None
        summed = rows.new_empty(size * self.count)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before PyTorch 2.13
        with self._naming_failures():
            gather(summed, total.contiguous())
        return summed[:width]

    @contextlib.contextmanager
    def naming_ended(self) -> Iterator[None]:
        """Name the process that has ended, if one has, in an error of communication that a library does itself."""
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                raise
            if not self._ended():
                raise
            raise ProcessGroupError(self._describe_failure()) from error

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessGroupError(self._describe_failure()) from error

    def _ended(self) -> list[int]:
        """Return the ranks on this machine that have ended; wait a moment for the first."""
        host, deadline = socket.gethostname(), time.monotonic() + GRACE
        while True:
            ended = [r for r, (where, pid) in enumerate(self._places) if where == host and not _is_alive(pid)]
            if ended or time.monotonic() > deadline:
                return ended
            time.sleep(0.05)

    def _describe_failure(self) -> str:
        host = socket.gethostname()
        if ended := self._ended():
            names = ", ".join(f"rank {rank} (process {self._places[rank][1]} on {host})" for rank in ended)
            return (
                f"{names} has ended, so rank {self.rank} stops as well; an error of that rank is above, if it had one"
            )
        far = sorted({where for where, _ in self._places} - {host})
        where = f"a process on {', '.join(far)} has ended" if far else "a process does not answer"
        return f"rank {self.rank} cannot reach the other {self.count - 1} ranks: {where}"


class Tree(Generic[Result]):
    """A sum in the binary tree over leaves 0, 1, ...: node (start, size) covers `size` leaves, a power of two.

    The tree is the same whatever block of leaves it begins with: a node is joined with its sibling only, and what has
    no sibling yet stays a node of its own. None adds nothing, not even a zero. in_order: no tree but one node, to which
    each leaf is added.
    """

    def __init__(self, add: Callable[[Result, Result], Result], start: int = 0, in_order: bool = False) -> None:
        self.nodes: list[tuple[int, int, Result | None]] = []
        self._add, self.end, self._in_order = add, start, in_order

    def push(self, value: Result | None, size: int = 1) -> None:
        """Add the next leaf, or the next node of `size` leaves."""
        start, self.end = self.end, self.end + size
        while self.nodes and (self._in_order or (self.nodes[-1][1] == size and self.nodes[-1][0] % (2 * size) == 0)):
            start, before, left = self.nodes.pop()
            size, value = before + size, self._sum(left, value)
        self.nodes.append((start, size, value))

    def total(self) -> Result | None:
        """Return the sum, as if None were pushed until one node is left."""
        return functools.reduce(lambda right, left: self._sum(left[2], right), reversed(self.nodes), None)

    def _sum(self, left: Result | None, right: Result | None) -> Result | None:
        if left is None or right is None:
            return right if left is None else left
        return self._add(left, right)


def join(device: torch.device) -> Processes:
    """Return the processes that torchrun started together with this one; only this one without torchrun.

    A script that has called init_process_group itself is taken as it is.
    """
    if not dist.is_available() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized()):
        return Processes(0, 1, None)
    if not dist.is_initialized():
        store, rank, count = next(dist.rendezvous("env://"))
        # torchrun keeps the store across restarts: under the old names are the addresses of processes that have ended
        store = dist.PrefixStore(f"attempt {restarts()}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
        atexit.register(_leave_at_exit)
    return _joined(dist.group.WORLD)


def leave() -> None:
    """Close the connections to the other processes; the end of the program does it otherwise."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _joined.cache_clear()


def _leave_at_exit() -> None:
    # gloo's threads abort a process that ends while they run; after an error, leaving may wait for ranks that ended
    if not hasattr(sys, "last_value"):
        leave()


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, one for each that torchrun started on this machine; another device as it is."""
    if str(device) != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if number >= there:
        raise ValueError(f"process {number} of this machine has no GPU: it has {there}; start fewer processes")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@functools.lru_cache(maxsize=1)
def _joined(group: Any) -> Processes:
    control = group if dist.get_backend(group) == "gloo" else dist.new_group(backend="gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), control)


def restarts() -> int:
    """Return how often torchrun --max-restarts has started this run anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launch() -> str:
    """Return torchrun's name of this launch, the same after each restart; "" without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
