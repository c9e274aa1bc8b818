"""The program of the engine's process: vLLM with its engine core in it, requests in, groups out.

    messages in                                       messages out
    arguments of EngineArgs, once                     ("ready",) or ("failed", why)
    ("sample", [(id, prompt ids, seed)], params)      ("group", id, [(token ids, log-probs, finish reason)])
    ("call", name of CALLS, arguments)                ("done", value)
                                                      ("alive",) now and then while there is work

Seeds: vLLM gives sample i of a request the seed + i, and draws each of its tokens from a generator (on GPUs a hash of seed
and position) of that sample's own, so a draw does not depend on what else is in the batch.
"""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from clipctl.rollout import SamplingParams

ALIVE_SECONDS = 5.0
Pipe = Connection  # messages are pickled: both ends are this user's own processes


def serve(fd: int, parent: int) -> None:
    """Runs until the pipe closes or `parent` is gone; then nothing of this process group is left. fd: of the pipe."""
    os.set_inheritable(fd, False)
    # Schedulers signal every process of a job; what to do about it is the parent's to decide.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe: Connection[Any, Any] = Connection(fd)
    try:
        engine = make_engine(pipe.recv())
        pipe.send(("ready",))
        answer(pipe, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the caller has hung up
    except BaseException as error:
        traceback.print_exc()
        pipe.send(("failed", _in_a_line(error)))
    sys.stdout.flush()
    sys.stderr.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)


def make_engine(arguments: Mapping[str, Any]) -> Any:
    """vLLM's engine. arguments: of `EngineArgs`, and `weight_backend`, the name of a weight-transfer engine or None."""
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from clipctl.engine.vllm_receiver import register

    register()
    given = dict(arguments)
    backend = given.pop("weight_backend")
    if backend is not None:
        given["weight_transfer_config"] = WeightTransferConfig(backend=backend)
    return LLMEngine.from_engine_args(EngineArgs(**given))


def answer(pipe: "Connection[Any, Any]", engine: Any) -> None:
    """Requests and calls as they come, one step of the engine after the other in between."""
    said = time.monotonic()
    while True:
        while pipe.poll(0 if engine.has_unfinished_requests() else None):
            kind, *rest = pipe.recv()
            if kind == "sample":
                add_requests(engine, *rest)
            else:
                name, arguments = rest
                pipe.send(("done", CALLS[name](engine, **arguments)))
        for output in engine.step():
            if output.finished:
                pipe.send(("group", int(output.request_id), [_completion(one) for one in output.outputs]))
                said = time.monotonic()
        if time.monotonic() - said > ALIVE_SECONDS:
            pipe.send(("alive",))
            said = time.monotonic()


def add_requests(engine: Any, requests: list[tuple[int, list[int], int]], n: int, params: SamplingParams) -> None:
    """Queues n samples of each of the requests: (id, prompt ids, seed)."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind

    for number, prompt_ids, seed in requests:
        asked = VllmParams(
            n=n,
            seed=seed,
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_tokens,
            stop_token_ids=sorted(params.stop_ids),
            ignore_eos=True,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(number), {"prompt_token_ids": prompt_ids}, asked)


def _completion(output: Any) -> tuple[list[int], list[float], str]:
    return list(output.token_ids), list(output.logprobs.logprobs), output.finish_reason


def _workers(engine: Any, method: str, **arguments: Any) -> None:
    """A method of all workers, such as those of weight transfer."""
    engine.collective_rpc(method, kwargs=arguments)


CALLS: dict[str, Callable[..., Any]] = {
    "workers": _workers,
    "reset_prefix_cache": lambda engine: engine.reset_prefix_cache(),
    "sleep": lambda engine: engine.sleep(level=2),
    "wake_up": lambda engine, tags: engine.wake_up(tags),
}


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _end_with(parent: int) -> None:
    """A thread that ends the process group when `parent` is gone, even in the middle of a step."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgrp(), signal.SIGKILL)
