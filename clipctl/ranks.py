"""The processes of a run: what each does of the work, and what all of them must know.

Every process ("rank") runs the same `train` with the same spec. Prompts and micro-batches are divided among the ranks, what
each makes of its share is gathered, and so all hold the whole rollout, the same state, and take the same decisions; rank 0
alone writes. Control goes over gloo, tensors on GPUs over NCCL. Of a run of one process nothing here does anything, and
torch.distributed is not loaded.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from clipctl.errors import ClipctlError, EngineError, SpecError, first_line
from clipctl.heartbeat import Heartbeat
from clipctl.interrupts import StopNow, StopRequests
from clipctl.rendezvous import Seat, find_seat

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import ProcessGroup, TCPStore

T = TypeVar("T")
JOIN_SECONDS = 300.0
"""In which all processes must have come."""
SLICE_SECONDS = 10.0
"""Of one attempt to reach rank 0: signals are looked at between two."""
CONTROL_TIMEOUT = timedelta(days=2)
"""Of a control operation: ranks may sample for very different times, and the dead are noticed otherwise."""
TENSOR_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`, `local_rank` among those of its machine. All methods but `mine` are called by all ranks
    together; they raise EngineError where a rank is lost."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    stop: StopRequests = field(default_factory=StopRequests)
    heartbeat: Heartbeat | None = None
    control: "ProcessGroup | None" = None
    """Of gloo, for objects and flags."""

    def mine(self, count: int) -> range:
        """Places of `count` things, in turns, that are this rank's."""
        return range(self.rank, count, self.size)

    def gather(self, thing: T) -> list[T]:
        """What each rank gave, by rank. Things are pickled."""
        if self.size == 1:
            return [thing]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(found, thing, group=self.control)
        return found

    def broadcast(self, thing: T) -> T:
        """What rank 0 gave."""
        if self.size == 1:
            return thing
        import torch.distributed as dist

        found = [thing]
        with self.together():
            dist.broadcast_object_list(found, src=0, group=self.control)
        return found[0]

    def sum(self, tensor: "Tensor") -> None:
        """Puts the sum over all ranks in the place of the tensor, the same bits on each."""
        if self.size > 1:
            import torch.distributed as dist

            with self.together():
                dist.all_reduce(tensor)

    def agree(self, flag: bool) -> bool:
        """Whether any rank's flag is true."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor([int(flag)])
        with self.together():
            dist.all_reduce(flags, group=self.control)
        return bool(flags)

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        self.agree(False)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block on rank 0, then on the others: what it fetches is there for them, once."""
        if self.rank:
            self.barrier()
        yield
        if not self.rank:
            self.barrier()

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop; then all are."""
        if not self.agree(bool(self.stop.reason)):
            return False
        requests = self.gather((self.stop.reason, self.stop.by_hand))
        self.stop.take(*next(request for request in requests if request[0]))
        return True

    def share(self, work: Callable[[], T]) -> list[T]:
        """What each rank made of its share of the work, by rank. Raises StopNow on all of them where any was asked to stop."""
        if self.size == 1:
            return [work()]
        made: tuple[T] | None = None
        try:
            with self.stop.interruptible():
                made = (work(),)
        except StopNow:
            if self.stop.at_once:
                raise
        found = self.gather(made)
        if self.asked_to_stop():
            raise StopNow
        return [each for made in found if made is not None for each in made]

    @contextmanager
    def at_work(self, on_end: Callable[[ClipctlError], None]) -> Iterator[None]:
        """The block is what the end of another rank ends; what follows it closes the run and is left alone. on_end: does that
        in its stead where the main thread cannot."""
        if self.heartbeat is None:
            yield
            return
        self.heartbeat.on_end = on_end
        try:
            yield
        finally:
            self.heartbeat.working = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what a library does of all ranks together: no request to stop ends it halfway, and where it fails the reason is
        that of the rank that was lost."""
        if self.heartbeat is None:
            yield
            return
        with self.stop.shielded():
            self.heartbeat.waiting = True
            try:
                yield
            except RuntimeError as error:
                import torch

                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise self.heartbeat.cause(error) from None
            finally:
                self.heartbeat.waiting = False


ALONE = Ranks()
"""The only process of its run."""


@contextmanager
def joined(stop: StopRequests, *, on_gpu: bool) -> Iterator[Ranks]:
    """The ranks of this run while the block runs: those that the environment tells of, or this process alone.

    An error of the block ends all ranks; only rank 0 says it, unless it cannot. Raises SpecError for an environment that makes
    no sense, EngineError where processes do not come within JOIN_SECONDS.
    """
    seat = find_seat()
    if seat is None:
        yield Ranks(stop=stop)
        return
    import torch.distributed as dist

    stop.echo = 2.0
    store = _meet(seat)
    heartbeat = Heartbeat(_connect(seat, is_master=False), seat, stop)
    try:
        control = _open_groups(seat, store, on_gpu)
        ranks = Ranks(seat.rank, seat.size, seat.local_rank, stop, heartbeat, control)
        ranks.barrier()
        heartbeat.start()
        if on_gpu:
            _refuse_shared_gpus(ranks)
        yield ranks
    except BaseException as found:
        error = stop.error("what was measured is kept") if isinstance(found, KeyboardInterrupt) else found
        heard = heartbeat.announce(error)
        if not (isinstance(error, ClipctlError) and error is heartbeat.failure):
            error.told = heard and seat.rank != 0  # type: ignore[attr-defined]
        stop.decided()
        heartbeat.leave(failed=True)
        if error is found:
            raise
        raise error from None
    heartbeat.leave(failed=False)
    dist.destroy_process_group()


def _meet(seat: Seat) -> "TCPStore":
    """The store of the run, when all ranks have come to it."""
    store = _connect(seat, is_master=seat.rank == 0 and not seat.hosted)
    store.set(f"here/{seat.rank}", socket.gethostname())
    missing = list(range(seat.size))
    end = time.monotonic() + JOIN_SECONDS
    while missing and time.monotonic() < end:
        missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
        time.sleep(0.05 if missing else 0)
    if missing:
        raise EngineError(
            f"of {seat.size} processes {len(missing)} did not come within {JOIN_SECONDS:.0f} s: rank "
            f"{', '.join(map(str, missing))}; look at what {seat.launcher} says of them"
        )
    return store


def _connect(seat: Seat, *, is_master: bool) -> "TCPStore":
    from torch._C._distributed_c10d import TCPStore

    end = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            return TCPStore(
                seat.address,
                seat.port,
                is_master=is_master,
                timeout=timedelta(seconds=SLICE_SECONDS),
                wait_for_workers=False,
                master_listen_fd=seat.listen if is_master else None,
            )
        except RuntimeError as error:
            said = first_line(error)
            if is_master:
                raise EngineError(
                    f"rank 0 cannot listen on port {seat.port} ({said}); set MASTER_PORT to a free one for all processes"
                ) from None
            if time.monotonic() > end:
                raise EngineError(
                    f"rank {seat.rank} on {socket.gethostname()} cannot reach rank 0 at {seat.address}:{seat.port} ({said}); "
                    "set MASTER_ADDR to a name or address of its machine that the others can reach"
                ) from None


def _open_groups(seat: Seat, store: "TCPStore", on_gpu: bool) -> "ProcessGroup":
    """The default group is that of tensors; the one that is returned that of control."""
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    backend = "gloo"
    if on_gpu and torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(_gpu(seat, torch.cuda.device_count()))
    dist.init_process_group(
        backend,
        store=PrefixStore("groups", store),
        rank=seat.rank,
        world_size=seat.size,
        timeout=TENSOR_TIMEOUT,
    )
    control: ProcessGroup = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return control


def _gpu(seat: Seat, gpus: int) -> int:
    """The only GPU that this process sees, or the one of its local rank."""
    if gpus > 1 and seat.local_rank >= gpus:
        raise SpecError(
            f"process {seat.local_rank} of this machine (counted from 0) has no GPU: it has {gpus}; start {gpus} processes a "
            "machine at most"
        )
    return 0 if gpus == 1 else seat.local_rank


def _refuse_shared_gpus(ranks: Ranks) -> None:
    """Raises SpecError where two ranks have one GPU, which NCCL does not take."""
    import torch

    mine = None
    if torch.cuda.is_available():
        mine = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    found = ranks.gather((socket.gethostname(), mine))
    for rank, place in enumerate(found):
        other = found.index(place)
        if mine is not None and other < rank:
            raise SpecError(
                f"ranks {other} and {rank} have the same GPU of {place[0]}: start one process for each GPU, under Slurm with "
                "--gpus-per-node and --ntasks-per-node of the same number"
            )
