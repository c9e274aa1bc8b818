"""vLLM as a sampler: an engine in a process of its own, which gets the policy's weights in place at every rollout.

Its log-probabilities are those of the distribution that it drew from (temperature and nucleus applied). Draws are keyed by
(seed, rollout, prompt, sample), see `vllm_server`; what a draw is made from is rounded differently in another batch, so two
runs agree until a draw falls between two such roundings. A lost engine is started again with the current weights and the
requests that it had not answered, `engine.vllm.rebuilds` times at most.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from clipctl.engine.vllm_process import EngineLost, EngineProcess
from clipctl.engine.vllm_setup import EngineSetup
from clipctl.engine.vllm_sleep import Sleep
from clipctl.engine.vllm_weights import SharedMemory, WeightPush
from clipctl.errors import EngineError
from clipctl.rollout import Completion, DrawKey, Prompt, SamplingParams, keyed_rng
from clipctl.spec import Vllm


class VllmSampler:
    """Samples with an engine of `setup`, which starts now and is waited for when it is first needed.

    push: the way of new weights. weights: the trainer's current ones, for an engine that is started again where the push
    does not keep them. tell: of an engine that was lost and is started again.
    """

    def __init__(
        self,
        settings: Vllm,
        setup: EngineSetup,
        push: WeightPush,
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        tell: Callable[[str], None],
    ) -> None:
        self._settings, self._setup, self._push, self._weights, self._tell = settings, setup, push, weights, tell
        self._sleep = Sleep(settings.sleep) if setup.devices else None
        self._rebuilt = 0
        self._began = False
        self._pushed = False
        self._stale = False
        self._process: EngineProcess | None = self._start()

    @property
    def pid(self) -> int | None:
        """Of the engine's process, None where there is none at present."""
        return None if self._process is None else self._process.pid

    def sample(
        self, prompts: Sequence[Prompt], n: int, params: SamplingParams, *, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(place, n completions) of each prompt that is not done, as vLLM finishes them.

        Raises EngineError when the engine is lost once too often.
        """
        waiting = {
            place: (place, prompt.token_ids, request_seed(prompt.key))
            for place, prompt in enumerate(prompts)
            if place not in done
        }
        try:
            while waiting:
                try:
                    process = self._running()
                    process.send(("sample", list(waiting.values()), n, params))
                    while waiting:
                        _, place, group = process.receive()
                        del waiting[place]
                        yield place, [_completion(ids, nats, why, params) for ids, nats, why in group]
                except EngineLost as lost:
                    self._replace(lost)
        finally:
            # Whoever goes away in the middle, on Ctrl-C too, leaves answers behind that the next one must not get.
            if waiting:
                self._end()

    def update_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Replaces the engine's weights in place and empties its prefix cache, whose keys and values are the old policy's.

        Raises EngineError when the engine is lost once too often.
        """
        self._push.take(weights)
        self._pushed = self._stale = True
        self._repeat(lambda process: None)

    def rest(self) -> None:
        """On a GPU, gives back the memory that the trainer needs, until there are new weights."""
        if self._sleep is not None:
            self._repeat(self._sleep.rest)

    def close(self) -> None:
        """Ends the engine's process, and all that it started."""
        self._end()
        self._push.close()

    def _start(self) -> EngineProcess:
        descriptors = [self._push.fd] if isinstance(self._push, SharedMemory) else []
        return EngineProcess(self._setup.arguments, self._setup.environment, descriptors)

    def _running(self) -> EngineProcess:
        """The engine, with the current weights; another one where there is none. Raises EngineLost."""
        if self._process is None:
            self._process = self._start()
            self._stale = self._pushed
            if self._pushed and not self._push.keeps:
                self._push.take(self._weights())
        process = self._process
        process.wait_until_ready()
        self._began = True
        if self._stale:
            if self._sleep is None:
                self._push.send(process)
            else:
                self._sleep.wake(process, lambda: self._push.send(process))
            emptied = process.call("reset_prefix_cache")
            assert emptied, "requests are under way"
            self._stale = False
        return process

    def _repeat(self, work: Callable[[EngineProcess], None]) -> None:
        """Does it with the running engine, and again with another one where that is lost."""
        while True:
            try:
                return work(self._running())
            except EngineLost as lost:
                self._replace(lost)
            except BaseException:
                self._end()
                raise

    def _replace(self, lost: EngineLost) -> None:
        """Makes way for another engine, or raises EngineError where that is not to be."""
        assert self._process is not None
        rebuilds, log = self._settings.rebuilds, self._process.log
        if self._began and self._rebuilt < rebuilds:
            self._end()
            self._rebuilt += 1
            self._tell(
                f"the vLLM engine was lost ({lost}): it is started again, the {self._rebuilt}. of {rebuilds} times at most"
            )
            return
        self._end(keep_log=True)
        if not self._began:
            raise EngineError(f"the vLLM engine did not start: {lost}; what it said is in {log}") from None
        raise EngineError(
            f"the vLLM engine was lost ({lost}) after it had been started again {self._rebuilt} of engine.vllm.rebuilds = "
            f"{rebuilds} times; what it said is in {log}; the same command goes on from the last checkpoint"
        ) from None

    def _end(self, *, keep_log: bool = False) -> None:
        process, self._process = self._process, None
        if self._sleep is not None:
            self._sleep.asleep = False
        if process is not None:
            process.close(keep_log=keep_log)


def request_seed(key: DrawKey) -> int:
    """The seed of a prompt's request, under 2^62; vLLM gives its sample i the seed + i."""
    return int(keyed_rng(key.seed, "vllm", key.rollout, key.position).integers(2**62))


def _completion(token_ids: list[int], logprobs: list[float], finish: str, params: SamplingParams) -> Completion:
    assert finish in ("stop", "length"), finish
    # The likeliest token is taken with certainty; vLLM reports its probability under the undivided logits.
    certain = [0.0] * len(token_ids)
    return Completion(token_ids, logprobs if params.temperature else certain, "stop" if finish == "stop" else "length")
