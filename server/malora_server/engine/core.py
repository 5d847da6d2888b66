"""The engine: takes requests, runs steps, gives back tokens. One thread, no I/O of its own.

On a GPU steps are pipelined: the next one is scheduled and launched while the device still computes
this one, its unknown tokens read on the device from where they were sampled. The one wait is for
the event after which a step's tokens are on the host.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from llguidance import LLMatcher
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from malora_server.adapters.store import AdapterError, News, StoredAdapter
from malora_server.engine.config import EngineConfig
from malora_server.engine.grammar import GrammarError, Grammars
from malora_server.engine.in_flight import Gates, InFlight
from malora_server.engine.kv_cache import BlockManager
from malora_server.engine.memory import count_blocks, device_capacity, host_capacity, make_store
from malora_server.engine.messages import (
    EngineStats,
    LoadAdapter,
    Outputs,
    PinAdapter,
    Ready,
    Report,
    RetireAdapter,
    SequenceOutput,
    SequenceStart,
    Submit,
    TokenLogprobs,
)
from malora_server.engine.monitor import Monitor, RoutedChunks
from malora_server.engine.sampler import Sampler, prompt_logprobs
from malora_server.engine.scheduler import Chunk, Scheduler
from malora_server.engine.sequence import Sequence, Status
from malora_server.engine.step_times import StepTimes
from malora_server.model.loader import (
    LoadedModel,
    choose_device,
    load_model,
    prepare_model,
)
from malora_server.model.runner import ChunkInput, ModelRunner

logger = logging.getLogger(__name__)

_STEPS_SHARE = 0.4
"""The share of a slowdown that a flood's tokens may make up by their number. The rest is for what
that does not tell: long contexts, and the step under way when a request comes."""
_LOADING_SECONDS = 0.005
"""How long a step waits at most for an adapter that is nearly there: this one may be shorter than
the last, which tells how much time there is."""
_COMPILING_SECONDS = 0.02
"""How long a step waits for a grammar at most, where it has nothing else to do."""


_CHANGED = AdapterError(
    "adapter_changed",
    "The adapter's files were replaced while the request waited for memory; send it again.",
)
_NO_ROOM = AdapterError(
    "adapter_no_room",
    "The adapter finds no room on the device beside those that are pinned there.",
)


@dataclass(slots=True)
class _Request:
    """What the engine keeps of a request beside its sequence."""

    adapter: StoredAdapter | None
    arrived: float
    scheduled: float | None = None
    """When it was first part of a step; both on the monotonic clock."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    started: bool = False


class EngineCore:
    """Loads the base model and the adapters, then serves requests step by step."""

    def __init__(
        self,
        config: EngineConfig,
        model: PreTrainedModel | None = None,
        pipelined: bool | None = None,
    ) -> None:
        """model: the base model, where it is in memory already; it is changed.

        pipelined: whether the next step is launched before this one's tokens are known. None: on a
        GPU, which computes meanwhile.

        Raises OSError or ValueError, with a message for the user, where it cannot start.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        has_tokenizer = model is None or Path(config.base).is_dir()
        if model is None:
            device = choose_device(config.device)
            model = load_model(config.base, config.dtype, device, config.quantization)
        self._loaded = loaded = prepare_model(model)
        device = loaded.device
        if device.type == "cpu":
            from malora.kernels import cpu

            cpu.compile_kernels()
        elif config.num_threads is None:
            # A step's work on the host is launching. Threads that divide its few copies spin beside
            # the one that launches, which then takes a quarter longer.
            torch.set_num_threads(1)
        device_bytes = device_capacity(config, loaded)
        host_bytes = host_capacity(config, loaded, device_bytes)
        self.adapters, resident = make_store(config, loaded, device_bytes, host_bytes)
        """Where every adapter's weights are."""
        self._max_model_len = min(
            loaded.max_model_len, config.max_model_len or loaded.max_model_len
        )
        # On the CPU the adapters' memory is not taken before they are read.
        reserved = 0 if device.type == "cuda" else device_bytes + host_bytes
        num_blocks = count_blocks(config, loaded, self._max_model_len, device_bytes, reserved)
        logger.info(
            "memory: %s bytes of weights, %s kept for adapters, %d blocks of KV cache",
            f"{loaded.num_bytes:,}",
            f"{device_bytes:,}",
            num_blocks,
        )
        self._runner = ModelRunner(
            loaded,
            resident,
            num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self._max_model_len,
        )
        self._runner.capture(adapted=config.adapters is not None)
        self._blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        self._step_times = StepTimes()
        self._settled = 0.0
        """When the last step's results were here, on the monotonic clock."""
        self._scheduler = Scheduler(
            self._blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self.adapters,
            _flood_tokens(self._step_times, config.max_slowdown),
        )
        self._grammars = _load_grammars(config, loaded) if has_tokenizer else None
        self._sampler = Sampler(self._grammars)
        self._requests: dict[str, _Request] = {}
        self._compiling: dict[str, tuple[Sequence, Future[LLMatcher]]] = {}
        """Sequences that wait for their grammar, each alone."""
        self._in_flight: InFlight | None = None
        self._idle_seconds = 0.0
        """For how long the last step's results had to be waited for."""
        self._suspects: deque[Chunk] = deque()
        self._monitor = Monitor(samples_decodes=device.type == "cpu")
        self._pipelined = device.type == "cuda" if pipelined is None else pipelined
        self._arrivals = count()
        self._steps = 0
        self.ready = Ready(
            max_model_len=self._max_model_len,
            vocab_size=loaded.vocab_size,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(device),
            eos_token_ids=loaded.eos_token_ids,
        )

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or running, a step under way, or an adapter's load."""
        return bool(
            self._scheduler.has_work
            or self._compiling
            or self._in_flight is not None
            or self.adapters.is_busy
        )

    @property
    def is_runnable(self) -> bool:
        """Whether a step would do anything now; else all that there is waits for the loader."""
        return bool(
            self._scheduler.is_runnable
            or self._compiling
            or self._in_flight is not None
            or self.adapters.has_news
            or self.adapters.waits_for_room() is not None
        )

    @property
    def loader_fd(self) -> int:
        """What becomes readable when an adapter is loaded; -1 while none is read from disk."""
        return self.adapters.fileno()

    def wait(self, seconds: float) -> None:
        """Wait until an adapter is loaded, at most so long."""
        self.adapters.wait(seconds)

    def add(self, submit: Submit) -> SequenceOutput | None:
        """Queue a request; returns its end at once where it cannot be served."""
        try:
            adapter = None if submit.adapter is None else self.adapters.get(submit.adapter)
            sequence = Sequence(
                submit,
                next(self._arrivals),
                self._loaded.eos_token_ids,
                self._max_model_len,
                adapter,
            )
            if adapter is not None:
                self.adapters.enter(adapter)
            try:
                if submit.sampling.grammar is None:
                    self._scheduler.add(sequence)
                else:
                    self._compile(sequence, submit.sampling.grammar)
            except ValueError:
                if adapter is not None:
                    self.adapters.leave(adapter)
                raise
        except AdapterError as error:
            return _failure(submit.request_id, str(error), error.code)
        except GrammarError as error:
            return _failure(submit.request_id, str(error), "invalid_grammar")
        except ValueError as error:
            return _failure(submit.request_id, str(error))
        self._requests[submit.request_id] = _Request(adapter, time.monotonic())
        return None

    def _compile(self, seq: Sequence, grammar: str) -> None:
        if self._grammars is None:
            raise GrammarError("this base model's tokenizer can't follow grammars")
        if seq.request_id in self._requests:
            raise ValueError(f"request id {seq.request_id!r} is in use: choose another")
        self._compiling[seq.request_id] = (seq, self._grammars.compile(grammar))

    def _schedule_compiled(self) -> list[SequenceOutput]:
        """Queue the sequences whose grammar is there; returns those that can't be served."""
        failures: list[SequenceOutput] = []
        if not self._scheduler.is_runnable and self._in_flight is None:
            futures = [future for _, future in self._compiling.values()]
            wait(futures, _COMPILING_SECONDS, FIRST_COMPLETED)  # nobody else needs a step
        for request_id, (seq, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[request_id]
            try:
                assert self._grammars is not None
                seq.matcher = self._grammars.matcher(future.result())
                self._scheduler.add(seq)
            except ValueError as error:
                self._forget(request_id)
                code = "invalid_grammar" if isinstance(error, GrammarError) else None
                failures.append(_failure(request_id, str(error), code))
        return failures

    def manage(self, message: LoadAdapter | PinAdapter | RetireAdapter) -> None:
        """Do what is asked of an adapter; its status tells when it is done."""
        match message:
            case LoadAdapter(version):
                self.adapters.load(version)
            case PinAdapter(version, pinned):
                self.adapters.pin(version, pinned)
            case RetireAdapter(version):
                self.adapters.retire(version)

    def abort(self, request_ids: list[str]) -> None:
        """Forget requests and free what they hold. Unknown ids are ignored."""
        for request_id in request_ids:
            waited = self._compiling.pop(request_id, None)
            if waited is not None or self._scheduler.abort(request_id) is not None:
                self._forget(request_id)

    def abort_all(self) -> Outputs:
        """Abort every request; the outputs tell whoever waits for them."""
        request_ids = list(self._requests)
        self.abort(request_ids)
        ends = [SequenceOutput(i, [], finish_reason="abort") for i in request_ids]
        return self.outputs(ends)

    def outputs(self, outputs: list[SequenceOutput]) -> Outputs:
        """These, and what else there is to tell."""
        return Outputs(outputs, self.stats(), self.adapters.changes())

    @property
    def has_changes(self) -> bool:
        """Whether there is anything to tell of adapters."""
        return self.adapters.has_changes

    def stats(self) -> EngineStats:
        """The state after the last step."""
        return EngineStats(
            num_requests_running=self._scheduler.num_running,
            num_requests_waiting=self._scheduler.num_waiting + len(self._compiling),
            kv_cache_usage_ratio=self._blocks.usage,
            prefix_cache_queries=self._blocks.num_queried_tokens,
            prefix_cache_hits=self._blocks.num_hit_tokens,
            preemptions=self._scheduler.num_preemptions,
            steps=self._steps,
            adapters=self.adapters.stats(),
        )

    def report(self) -> Report | None:
        """What there is to tell beside each step's outputs; None most of the time."""
        return self._monitor.report()

    def step(self) -> Outputs:
        """Launch one step; what the last one launched added to each sequence, and what it ended.

        Where steps are not pipelined, that is this one itself.
        """
        if self._in_flight is not None:
            # The device is busy: launching its next step a little later costs nobody anything, and
            # saves the requests for an adapter that comes meanwhile a whole step.
            self.adapters.wait_for_load(min(self._idle_seconds / 2, _LOADING_SECONDS))
        outputs = self._advance_adapters()
        if self._in_flight is not None and self._in_flight.settles_first:
            outputs += self._settle()
        if self._compiling:
            outputs += self._schedule_compiled()
        chunks = self._next_suspect() or self._scheduler.schedule()
        launched = self._launch(chunks, outputs) if chunks else None
        outputs += self._settle()
        self._in_flight = launched
        if not self._pipelined:
            outputs += self._settle()
        return self.outputs(outputs)

    def _advance_adapters(self) -> list[SequenceOutput]:
        """Let sequences go on whose adapters have come; the ends of those whose adapters cannot."""
        ends = self._take_in(self.adapters.poll())
        ends += self._refuse(self._scheduler.without_hope(), _NO_ROOM)
        self._scheduler.place_adapters()
        if self.adapters.has_arrival:  # in time for the step that is launched next
            ends += self._take_in(self.adapters.poll())
        return ends

    def _take_in(self, news: News) -> list[SequenceOutput]:
        ends: list[SequenceOutput] = []
        for adapter in news.loaded:
            self._scheduler.adapter_loaded(adapter)
        for adapter, error in news.failed:
            ends += self._refuse(self._scheduler.waiting_for(adapter), error)
        for adapter in news.ready:
            ends += self._refuse(self._scheduler.adapter_ready(adapter), _CHANGED)
        return ends

    def _refuse(self, sequences: list[Sequence], error: AdapterError) -> list[SequenceOutput]:
        ids = [seq.request_id for seq in sequences]
        self.abort(ids)
        return [_failure(i, str(error), error.code) for i in ids]

    def _forget(self, request_id: str) -> None:
        request = self._requests.pop(request_id)
        if request.adapter is not None:
            self.adapters.leave(request.adapter)

    def _next_suspect(self) -> list[Chunk]:
        while self._suspects:
            chunk = self._suspects.popleft()
            if chunk.seq.status is Status.RUNNING:
                return [chunk]
        return []

    def _fail(self, chunks: list[Chunk]) -> list[SequenceOutput]:
        # Whatever broke, it broke these sequences alone: they end, the engine goes on.
        logger.exception("a step of %d sequences failed", len(chunks))
        self._check_device()
        ids = [i for i in (chunk.seq.request_id for chunk in chunks) if i in self._requests]
        self.abort(ids)
        return [_failure(i, "the engine failed on this request; see its log") for i in ids]

    def _check_device(self) -> None:
        """Raise where the device is lost to this process, so that another one takes its place."""
        if self._loaded.device.type == "cuda":
            torch.cuda.synchronize(self._loaded.device)

    def _launch(self, chunks: list[Chunk], outputs: list[SequenceOutput]) -> InFlight | None:
        """Queue a step's work on the device; failures go to `outputs`.

        Where several sequences fail together, each is tried again alone before anything else runs:
        nothing of the step counts yet, and only what fails alone is to blame. Too large a step for
        the memory there is harms nobody then.
        """
        try:
            return self._run(chunks)
        except Exception:
            if len(chunks) == 1:
                outputs += self._fail(chunks)
            else:
                logger.exception("a step of %d sequences failed: each is run alone", len(chunks))
                self._check_device()
                self._suspects.extend(chunks)
            return None
        finally:
            self._steps += 1

    def _run(self, chunks: list[Chunk]) -> InFlight:
        pending = {} if self._in_flight is None else self._in_flight.rows
        now = time.monotonic()
        inputs = []
        for chunk in chunks:
            seq = chunk.seq
            request = self._requests[seq.request_id]
            if request.scheduled is None:
                request.scheduled = now
            inputs.append(
                ChunkInput(
                    seq.token_ids[chunk.start : chunk.start + chunk.num_tokens],
                    chunk.start,
                    seq.block_table,
                    None if request.adapter is None else request.adapter.device,
                    pending.get(seq.request_id) if seq.num_pending else None,
                )
            )
        wanted: list[int] = []
        prompts: list[tuple[Chunk, slice]] = []
        sampled_rows: list[int] = []
        sampled_at: list[int] = []
        sequences: list[Sequence] = []
        first = 0
        for chunk in chunks:
            predicted = _num_predicted_prompt_tokens(chunk)
            if predicted:
                prompts.append((chunk, slice(len(wanted), len(wanted) + predicted)))
                wanted.extend(range(first, first + predicted))
            if chunk.samples:
                sampled_rows.append(len(wanted))
                sampled_at.append(first + chunk.num_tokens - 1)
                sequences.append(chunk.seq)
                wanted.append(first + chunk.num_tokens - 1)
            first += chunk.num_tokens
        self._monitor.count_step(first)
        watched = self._monitor.wants_routing(
            (each.adapter for each in inputs),
            decodes_alone=first == len(chunks),
        )
        routed = watched or any(seq.sampling.routing is not None for seq in sequences)
        token_ids = None if self._in_flight is None else self._in_flight.token_ids
        logits, taken = self._runner.run(inputs, wanted, routed, token_ids)
        for chunk, rows in prompts:
            self._keep_prompt_logprobs(chunk, logits[rows])
        if prompts:
            logits = logits[torch.tensor(sampled_rows, device=logits.device, dtype=torch.int64)]
        sampled = self._sampler.sample(logits, sequences) if sequences else None
        gates = None if taken is None else Gates.of(taken, sampled_at)
        sums = None
        if watched and taken is not None:
            sums = RoutedChunks.of(
                taken,
                [chunk.seq.tenant for chunk in chunks],
                [each.adapter for each in inputs],
                [chunk.num_tokens for chunk in chunks],
            )
        self._scheduler.advance(chunks)
        return InFlight(chunks, sequences, sampled, gates, sums, now)

    def _settle(self) -> list[SequenceOutput]:
        """Wait for the tokens of the step in flight, and take them in."""
        step, self._in_flight = self._in_flight, None
        if step is None:
            return []
        start = time.monotonic()
        try:
            step.wait()
        except Exception:
            return self._fail(step.chunks)
        now = time.monotonic()
        self._idle_seconds = now - start
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        self._step_times.add(num_tokens, now - max(step.launched, self._settled))
        self._settled = now
        if step.routed is not None:
            self._monitor.add_routing(step.routed)
        # Those that finished or were aborted since want no more.
        live = {seq.request_id for seq in step.sequences if seq.request_id in self._requests}
        bad = {
            seq.request_id
            for seq, is_bad in zip(step.sequences, step.bad, strict=True)
            if is_bad and seq.request_id in live
        }
        self.abort(list(bad))
        self._scheduler.settle(step.chunks, step.tokens)
        outputs = []
        for row, seq in enumerate(step.sequences):
            if seq.request_id in bad:
                outputs.append(_no_token(seq))
            elif seq.request_id in live:
                outputs.append(self._output(seq, step, row))
        return outputs

    def _output(self, seq: Sequence, step: InFlight, row: int) -> SequenceOutput:
        request = self._requests[seq.request_id]
        first = not request.started
        request.started = True
        if seq.finish_reason is not None:
            self._forget(seq.request_id)
        logprobs = step.token_logprobs(row)
        routing = step.token_routing(row)
        start = None
        if first and request.scheduled is not None:
            scheduled = request.scheduled
            start = SequenceStart(scheduled - request.arrived, time.monotonic() - scheduled)
        return SequenceOutput(
            seq.request_id,
            [step.tokens[row]],
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            num_cached_tokens=seq.num_cached_tokens,
            logprobs=None if logprobs is None else [logprobs],
            prompt_logprobs=(
                request.prompt_logprobs
                if first and seq.sampling.prompt_logprobs is not None
                else None
            ),
            routing=None if routing is None else [routing],
            start=start,
        )

    def _keep_prompt_logprobs(self, chunk: Chunk, logits: Tensor) -> None:
        """logits: those that predict the prompt's tokens start + 1, …"""
        top_n = chunk.seq.sampling.prompt_logprobs or 0
        begin = chunk.start + 1
        targets = chunk.seq.token_ids[begin : begin + len(logits)]
        values = prompt_logprobs(logits, torch.tensor(targets, device=logits.device), top_n)
        logprobs, top_ids, top_logprobs = (v.tolist() for v in values)
        kept = self._requests[chunk.seq.request_id].prompt_logprobs
        # A sequence preempted in its prompt computes these positions again.
        del kept[chunk.start :]
        kept.extend(map(TokenLogprobs, targets, logprobs, top_ids, top_logprobs))


def _flood_tokens(times: StepTimes, max_slowdown: float | None) -> Callable[[], int] | None:
    """What a flood may have of a step so that others take no more than so many times as long.

    Others send as much however long it takes: of each second their tokens take the same share,
    which leaves a step that much longer than its fixed part. So where a flood makes this part
    longer by some factor, it makes steps longer by that factor, however many the others are.
    """
    if max_slowdown is None:
        return None
    share = _STEPS_SHARE * (max_slowdown - 1)
    return lambda: int(share * times.fixed_tokens)


def _num_predicted_prompt_tokens(chunk: Chunk) -> int:
    """How many of the chunk's leading positions predict prompt tokens that somebody asked for."""
    seq = chunk.seq
    if seq.sampling.prompt_logprobs is None or seq.num_output_tokens:
        return 0
    return max(0, min(chunk.start + chunk.num_tokens, seq.num_prompt_tokens - 1) - chunk.start)


def _failure(request_id: str, error: str, code: str | None = None) -> SequenceOutput:
    return SequenceOutput(request_id, [], finish_reason="error", error=error, error_code=code)


def _no_token(seq: Sequence) -> SequenceOutput:
    """The end of a sequence that had no token to choose."""
    if seq.matcher is not None and seq.matcher.error is not None:
        error = f"the text can't go on as its grammar demands: {seq.matcher.error}"
        return _failure(seq.request_id, error, "invalid_grammar")
    return _failure(seq.request_id, "the model gave no finite scores for the next token")


def _load_grammars(config: EngineConfig, loaded: LoadedModel) -> Grammars | None:
    """None where the base model has no tokenizer that can follow grammars."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.base)
        if not tokenizer.is_fast:
            raise GrammarError("it has no tokenizer.json")
        backend = tokenizer.backend_tokenizer
        return Grammars(backend, loaded.vocab_size, loaded.eos_token_ids, config.num_threads)
    except (OSError, ValueError) as error:
        logger.warning("no structured output: %s", str(error).strip().split("\n")[0])
        return None
