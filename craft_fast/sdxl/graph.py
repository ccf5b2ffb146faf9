"""One function recorded once as a CUDA graph and replayed; and the other way to fewer launches, regional compilation.

A step of SDXL is some ten thousand kernel launches. A GPU that is faster than the CPU can launch waits for it; a
recorded graph is one launch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from craft_fast.quiet import import_bitsandbytes
from craft_fast.sdxl.weights import free_memory

T = TypeVar("T")

_streams: dict[torch.device, Any] = {}


def _ignore(message: str) -> None:
    """What is done about a fallback by default."""


class Replay(Generic[T]):
    """``fn`` over static input buffers, on a GPU recorded after some calls and replayed from then on.

    Every call copies its tensors into the same buffers and runs ``fn`` on those, recorded or not, so both give the same
    bits. The first ``warmup`` calls run ``fn`` itself: kernels are compiled and chosen by them, libraries allocate what
    they keep. The next call records it, and that call and all later ones replay.

    An input that is the same tensor as in the last call, unchanged, is not copied again: ``fn`` must not write to its
    inputs. While it is recorded it may launch kernels, and nothing that waits for the device or takes a value from it.
    Tensors that it reads besides its inputs, and those that it writes, must stay where they are: parameters, gradients
    that are views of one buffer. Backward inside of ``fn`` works; with ``p.grad`` None, gradients would lie in the
    graph's own memory.

    Recording that fails is told once, and everything goes on without, in that very call. ``torch.OutOfMemoryError`` is
    the caller's, before anything was done: ``fn`` has then not run in that call, and the next call tries again.

    Args:
        fn: called with keyword arguments, all tensors on one device. Its results are returned as they are.
        record: whether to record, on CUDA; elsewhere nothing is recorded.
        warmup: calls before recording, at least 1.
        pool: ``torch.cuda.graph_pool_handle()``, shared by graphs of which results are used up before the next one of
            them runs; None: memory of its own.
        on_fallback: told once why recording failed.

    Attributes:
        recorded: whether calls replay a graph now.
        fallback: whether recording was tried and failed.
    """

    def __init__(
        self,
        fn: Callable[..., T],
        *,
        record: bool,
        warmup: int = 2,
        pool: Any = None,
        on_fallback: Callable[[str], None] = _ignore,
    ) -> None:
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        self.fn, self.record, self.warmup = fn, record, warmup
        self.pool, self.on_fallback = pool, on_fallback
        self.fallback = False
        self._calls = 0
        self._static: dict[str, Tensor] | None = None
        # What was copied last: a weak reference, so that an input's memory is not kept, and its version.
        self._sources: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._graph: Any = None
        self._result: T | None = None

    @property
    def recorded(self) -> bool:
        """Whether calls replay a graph now."""
        return self._graph is not None

    def __call__(self, **tensors: Tensor) -> T:
        """Run ``fn`` on copies of ``tensors``.

        Args:
            tensors: the same names, shapes, dtypes and devices each time.

        Returns:
            What ``fn`` returns; of a graph, the graph's own tensors, valid until the next call.

        Raises:
            ValueError: a name, shape, dtype or device is another than in the first call: keep a Replay for each.
            torch.OutOfMemoryError: memory did not suffice, for ``fn`` or for its recording.
        """
        device = self._copy_in(tensors)
        if not self.record or self.fallback or device.type != "cuda":
            return self._run()
        if self._graph is None:
            if self._calls < self.warmup:
                result = self._on_side_stream(device)
                self._calls += 1
                return result
            self._capture(device)
        if self._graph is None:
            return self._run()
        self._graph.replay()
        # Kernels of a graph change tensors behind torch's back; another Replay must see that its input is a new one.
        for tensor in _tensors(self._result):
            torch.autograd.graph.increment_version(tensor)
        return self._result  # type: ignore[return-value]

    def release(self) -> None:
        """Give back the memory of graph, results and buffers; the next call begins anew, with other shapes if it will.

        Results that the caller still holds keep theirs.
        """
        self._drop_graph()
        self._static = None
        self._sources.clear()
        self._calls = 0
        if torch.cuda.is_initialized():
            free_memory()

    # ---- inputs

    @torch.no_grad()
    def _copy_in(self, tensors: dict[str, Tensor]) -> torch.device:
        if self._static is None:
            # Inside of inference mode too: a buffer that was made there could not be written to outside.
            with torch.inference_mode(False):
                self._static = {name: torch.empty_like(value, requires_grad=False) for name, value in tensors.items()}
        _check_same(self._static, tensors)
        for name, value in tensors.items():
            buffer = self._static[name]
            if value is not buffer and not self._is_in(name, value):
                buffer.copy_(value, non_blocking=True)
                self._note(name, value)
        if len(devices := {buffer.device for buffer in self._static.values()}) > 1:
            raise ValueError(f"inputs must be on one device, got {sorted(map(str, devices))}")
        return next(iter(devices), torch.device("cpu"))

    def _is_in(self, name: str, value: Tensor) -> bool:
        """Whether ``value`` is what was copied last, and unchanged since then."""
        if value.is_inference() or name not in self._sources:
            return False
        source, version = self._sources[name]
        return source() is value and value._version == version

    def _note(self, name: str, value: Tensor) -> None:
        # Tensors of inference mode do not count their changes.
        if value.is_inference():
            self._sources.pop(name, None)
        else:
            self._sources[name] = (weakref.ref(value), value._version)

    # ---- running and recording

    def _run(self) -> T:
        assert self._static is not None
        return self.fn(**self._static)

    def _on_side_stream(self, device: torch.device) -> T:
        """``fn`` on the stream that will be recorded: what libraries allocate by stream is then there already."""
        stream, current = _side_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                return self._run()
        finally:
            current.wait_stream(stream)

    def _capture(self, device: torch.device) -> None:
        """Record ``fn``; where that fails, note it and leave everything as before the call."""
        graph, stream = torch.cuda.CUDAGraph(), _side_stream(device)
        pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        failure: str | None = None
        try:
            # Around torch's own, which does not restore the stream when recording ends with an error. Only this thread
            # must not wait: another one may be busy with a progress bar or a file.
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                result = self._run()
        except Exception as error:
            failure, memory = _first_line(error), _is_out_of_memory(error)
        if failure is None:
            self._graph, self._result = graph, result
            return
        # Outside of `except`, whose traceback would keep what `fn` made alive.
        _abandon(graph, pool, device)
        if memory:
            raise torch.OutOfMemoryError(f"while recording a CUDA graph: {failure}")
        self.fallback = True
        self.on_fallback(failure)

    def _drop_graph(self) -> None:
        self._result = None
        if self._graph is not None:
            # A replay that is under way reads the memory that goes.
            torch.cuda.synchronize()
            self._graph.reset()
            self._graph = None


def compile_blocks(unet: nn.Module) -> int:
    """Have the forward of every ``BasicTransformerBlock`` of ``unet`` compiled at its next call.

    The blocks, not the whole: equal ones share the code, so minutes instead of tens of them, for most of the gain.
    A block that is compiled already stays as it is. Where activations are computed again in backward, compiled code
    does it: the compiler sees the block alone, whether ``qlora.recompute`` is told before or after this.

    Args:
        unet: a diffusers UNet in any form; changed in place, by an attribute of each block.

    Returns:
        How many blocks were told to.
    """
    import_bitsandbytes()  # before diffusers, which would import it with its request to a hub
    from diffusers.models.attention import BasicTransformerBlock

    count = 0
    for block in unet.modules():
        if not isinstance(block, BasicTransformerBlock):
            continue
        holder: Any = block
        name = "forward"
        while hasattr(getattr(holder, name), "inner"):  # what recomputes has the forward in it
            holder, name = getattr(holder, name), "inner"
        if not getattr(getattr(holder, name), "_is_compiled", False):
            compiled: Any = torch.compile(getattr(holder, name), dynamic=False)
            compiled._is_compiled = True
            setattr(holder, name, compiled)
            count += 1
    return count


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors in what a function returned that count their changes."""
    if isinstance(result, Tensor):
        if not result.is_inference():
            yield result
    elif isinstance(result, dict):
        yield from _tensors(tuple(result.values()))
    elif isinstance(result, list | tuple):
        for item in result:
            yield from _tensors(item)


def _check_same(static: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    if static.keys() != tensors.keys():
        raise ValueError(f"inputs must be {sorted(static)} each time, got {sorted(tensors)}")
    for name, buffer in static.items():
        value = tensors[name]
        if value.shape != buffer.shape or value.dtype != buffer.dtype or value.device != buffer.device:
            raise ValueError(
                f"{name} must be {buffer.dtype} {tuple(buffer.shape)} on {buffer.device} each time, "
                f"got {value.dtype} {tuple(value.shape)} on {value.device}: keep a Replay for each shape"
            )


def _side_stream(device: torch.device) -> Any:
    """One stream a device for all recordings: graphs that share memory must be recorded on the same one."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _abandon(graph: Any, pool: Any, device: torch.device) -> None:
    """Give back the memory of a recording that failed."""
    torch_c: Any = torch._C
    try:
        graph.pool()
        ended = True
    except RuntimeError:
        ended = False
    graph.reset()
    if not ended:
        # A recording that could not be ended leaves the allocator's own bookkeeping open.
        for close in (torch_c._cuda_endAllocateToPool, torch_c._cuda_releasePool):
            with suppress(RuntimeError):
                close(torch.cuda.current_device() if device.index is None else device.index, pool)
    free_memory()


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that it came from: the end of a recording fails too, and hides what failed inside of it."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def _is_out_of_memory(error: BaseException) -> bool:
    return any(
        isinstance(at, torch.OutOfMemoryError) or (isinstance(at, RuntimeError) and "out of memory" in str(at))
        for at in _chain(error)
    )


def _first_line(error: BaseException) -> str:
    first = _chain(error)[-1]
    return (str(first).strip().splitlines() or [type(first).__name__])[0]
