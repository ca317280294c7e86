"""The engine: the order in which it is built, and the step.

`build` is the written order of memory (contract line 8); `Engine.step` is the main loop. The
engine owns nothing that a step reads: it passes things between their makers.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .config import EngineConfig, EngineOptions, available_memory, resolve
from .errors import (
    CheckpointError,
    EngineDeadError,
    KVCacheError,
    ModelNotFoundError,
    RequestError,
    suggest,
)
from .graphs.inspect import AddressBook
from .graphs.keys import KeyBook
from .graphs.plan import CudaGraphMode, Plan, default_prefill_seqs, default_token_sizes
from .graphs.profile import Profile
from .graphs.results import Pending, ResultRing
from .graphs.runner import Again, Arena, EagerRunner, Runner, StepProgram
from .inputs import BufferShapes, StepBuffers
from .kv_blocks import BlockAllocator
from .kv_cache import KVCache
from .models.spec import ModelSpec
from .ops import select
from .outputs import OutputAssembler
from .scheduler import Scheduler, SchedulerConfig
from .types import (
    MAX_STOP_IDS,
    FinishReason,
    GraphKey,
    Request,
    RequestOutput,
    Route,
    SamplerVariant,
    SamplingParams,
    Schedule,
    SteadyRows,
    StepKind,
    TokenGrammar,
)

if TYPE_CHECKING:
    from .graphs.backend import GraphBackend
    from .models.checkpoint import Checkpoint
    from .models.decoder import Decoder
    from .tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 1 << 30
"""KV cache on a CPU, unless asked otherwise."""


@dataclass(frozen=True)
class MemoryLine:
    """One line of the memory order."""

    name: str
    nbytes: int


class Engine:
    """Runs requests. One thread; `step` does one round of the main loop."""

    def __init__(
        self,
        *,
        name: str,
        config: EngineConfig,
        spec: ModelSpec,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
        scheduler: Scheduler,
        plan: Plan,
        buffers: StepBuffers,
        runner: Runner,
        context: Callable[[], AbstractContextManager[Any]],
        memory: Sequence[MemoryLine],
        startup: Mapping[str, float],
        profile: Profile | None = None,
        predicted_graph_bytes: int | None = None,
    ) -> None:
        """Parts that fit together; `build` makes them.

        Args:
            name: what to call the model.
            config: resolved options.
            spec: the model's sizes.
            tokenizer: None where prompts are token ids and no text is wanted.
            eos_token_ids: tokens that end a sequence.
            scheduler: says what runs.
            plan: says on which graph.
            buffers: what a step reads.
            runner: what launches a step.
            context: entered around all device work (the engine's stream on a GPU).
            memory: what was allocated, in order.
            startup: seconds of each stage of the start.
            profile: where to remember which keys fired; None where there are no graphs.
            predicted_graph_bytes: what the executables of the greedy ladder were expected to take,
                before the KV cache was sized; None where there are no graphs.
        """
        self.predicted_graph_bytes = predicted_graph_bytes
        self.name, self.config, self.spec, self.tokenizer = name, config, spec, tokenizer
        self.scheduler, self.plan, self.buffers, self.runner = scheduler, plan, buffers, runner
        self.memory, self.startup = tuple(memory), dict(startup)
        self.eos_token_ids = eos_token_ids
        self.outputs = OutputAssembler(plan)
        self.device_context, self._profile = context, profile
        self._inflight: deque[tuple[Schedule, Pending]] = deque()
        self._again: Again | None = None
        """What launches the last step once more."""
        self._seeds = random.Random(config.seed)
        self._counter = 0
        self._dead: BaseException | None = None

    # --- the main loop -----------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Launch one step, and commit the oldest one in flight once the pipeline is full.

        Returns:
            Outputs of requests that got a token or ended, as their `output_kind` asks.
        """
        return self._step(outputs=True)

    def advance(self) -> list[Request]:
        """`step` for who reads the requests themselves: those that got a token or ended.

        Whoever uses this passes the ended ones to `outputs.make`, which forgets them.
        """
        return self._step(outputs=False)

    def _step(self, *, outputs: bool) -> list[Any]:
        if self._dead is not None:
            self._check_alive()
        inflight, again = self._inflight, self._again
        try:
            if (
                again is not None
                and again.record.trusted
                and again.ring.counted
                and (schedule := self.scheduler.repeat()) is not None
            ):  # the device does what it did last; `_launch` would find that out in five times as long
                inflight.append((schedule, again.launch()))
            else:
                with self.device_context():
                    schedule = self._launch()
            if len(inflight) < self.config.pipeline_depth and (schedule is not None or not inflight):
                return []
            launched, pending = inflight.popleft()
            changed = self.scheduler.commit(launched, pending.result())
            if not outputs:
                return list(changed)
            return [] if changed is self.outputs.silent else self.outputs.make(changed)
        except BaseException as error:
            self._abandon(error)
            raise

    def _launch(self) -> Schedule | None:
        """Launch whatever comes next; None if there is nothing to launch before a commit."""
        runner = self.runner
        runner.poll()
        schedule = self.scheduler.schedule()
        if schedule is not None:
            batch = self.buffers.write(schedule, self.plan.route(schedule))
            self._inflight.append((schedule, runner.run(batch)))
            self._again = runner.again(batch) if isinstance(schedule.rows, SteadyRows) else None
        return schedule

    @property
    def program(self) -> StepProgram:
        """The step, as every runner launches it."""
        return self.runner.program

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._inflight)

    # --- requests ----------------------------------------------------------------------

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        *,
        add_special_tokens: bool = True,
        bad_word_ids: Sequence[Sequence[int]] = (),
        grammar: TokenGrammar | None = None,
    ) -> str:
        """Queue a prompt; returns its id.

        Args:
            prompt: text or token ids.
            params: what to sample.
            request_id: None: the next number.
            add_special_tokens: what the model expects around a text, such as BOS.
            bad_word_ids: token sequences that must not be completed, beside those of `params.bad_words`.
            grammar: what the output has to follow; for one completion (n=1).

        Raises:
            RequestError: the prompt or a parameter cannot be served by this model.
        """
        self._check_alive()
        text, ids = self._encode(prompt, add_special_tokens)
        self._check(ids, params)

        prompt_id = self.new_id(params) if request_id is None else request_id
        request_ids = _names(prompt_id, params)
        taken = self.outputs.taken(prompt_id, request_ids)
        if taken is not None:
            raise RequestError(f"request id {taken!r} is already running")
        seed = self._seeds.getrandbits(62) if params.seed is None else params.seed
        limit = self.config.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(ids) + params.max_tokens)
        bad_words = (*self._bad_words(params), *map(tuple, bad_word_ids))
        banned = {word[0] for word in bad_words if len(word) == 1}
        if params.allowed_token_ids is not None and banned.issuperset(params.allowed_token_ids):
            raise RequestError("bad_words: they forbid all of allowed_token_ids")
        requests = [
            Request(
                request_id=name,
                prompt_id=prompt_id,
                prompt_token_ids=ids,
                params=params,
                stop_token_ids=params.stops(self.eos_token_ids),
                max_total_tokens=limit,
                seed=seed + i,
                index=i,
                bad_word_ids=bad_words,
                grammar=grammar,
                sink=self.tokenizer.stream(params, ids) if self.tokenizer and params.detokenize else None,
            )
            for i, name in enumerate(request_ids)
        ]
        try:
            for request in requests:
                self.scheduler.add(request)
            self.outputs.add(prompt_id, text, requests, params, self.token_text)
        except BaseException:  # an interrupt may come between any two lines
            for request in requests:
                self.scheduler.abort(request.request_id)
            self.outputs.discard(prompt_id)
            raise
        return prompt_id

    def new_id(self, params: SamplingParams) -> str:
        """An id that no prompt under way has, nor any of its requests."""
        while True:
            self._counter += 1
            number = str(self._counter)
            if self.outputs.taken(number, _names(number, params)) is None:
                return number

    def abort(self, prompt_ids: Iterable[str]) -> list[RequestOutput]:
        """End requests now; their outputs carry what they have, with finish_reason "abort"."""
        ended = []
        for prompt_id in prompt_ids:
            for request in self.outputs.running(prompt_id):
                if self.scheduler.abort(request.request_id) is not None:
                    ended.append(request)
        return self.outputs.make(ended) if ended else []

    def token_text(self, token_id: int) -> str | None:
        """Text of one token, for logprobs."""
        return self.tokenizer.token_text(token_id) if self.tokenizer else None

    def _encode(
        self, prompt: str | Sequence[int], add_special_tokens: bool
    ) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model has no tokenizer: pass token ids instead of text")
            return prompt, tuple(self.tokenizer.encode(prompt, add_special_tokens))
        if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
            raise RequestError(f"a prompt must be text or a list of token ids, got {type(prompt).__name__}")
        ids = tuple(prompt)
        if set(map(type, ids)) == {int}:  # most prompts
            return None, ids
        for token in ids:
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise RequestError(f"a prompt must be text or a list of token ids, got {token!r} in it")
        return None, tuple(int(token) for token in ids)

    def _check(self, ids: tuple[int, ...], params: SamplingParams) -> None:
        vocab, longest = self.spec.vocab_size, self.config.max_model_len
        if not ids:
            raise RequestError("the prompt is empty: it needs at least one token")
        if len(ids) >= longest:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; with max_model_len={longest} it may have at most {longest - 1}, "
                "so that one more fits"
            )
        named = {
            "prompt": ids,
            "stop_token_ids": params.stop_token_ids or (),
            "allowed_token_ids": params.allowed_token_ids or (),
            "logit_bias": tuple(params.logit_bias or ()),
        }
        for name, tokens in named.items():
            if tokens and (min(tokens) < 0 or max(tokens) >= vocab):
                wrong = next(t for t in tokens if not 0 <= t < vocab)
                raise RequestError(
                    f"{name}: token id {wrong} is out of range; the vocabulary has ids 0 to {vocab - 1}"
                )
        params.stops(self.eos_token_ids)
        if self.tokenizer is None and (params.stop_strings or params.bad_words):
            raise RequestError("stop and bad_words need a tokenizer; use stop_token_ids or allowed_token_ids")

    def _bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        if not params.bad_words:
            return ()
        assert self.tokenizer is not None
        return self.tokenizer.bad_word_ids(params.bad_words)

    # --- failure -----------------------------------------------------------------------

    def _check_alive(self) -> None:
        if isinstance(self._dead, EngineDeadError):
            raise EngineDeadError(*self._dead.args)
        if self._dead is not None:
            raise EngineDeadError(
                f"the engine failed earlier ({self._dead!r}); make a new one"
            ) from self._dead

    def _abandon(self, error: BaseException) -> None:
        """A step failed: end every request, forget what was in flight, stay usable if the device is.

        It may have been launched without being in the pipeline, so the device is waited for and not the
        steps that are known.
        """
        self._inflight.clear()
        try:
            with self.device_context():
                self.program.ops.reset()
                self.runner.forget()
                if self.config.device.type == "cuda":
                    torch.cuda.current_stream().synchronize()
        except Exception as second:  # the device itself is gone: the first error is the one raised
            logger.exception("the device does not answer after a failed step")
            self._dead = second
        finally:
            reason = FinishReason.ABORT if isinstance(error, KeyboardInterrupt) else FinishReason.ERROR
            self.scheduler.reset(reason)
            self.outputs.fail(error)

    def release_graphs(self) -> int:
        """Free all graphs; returns their bytes. The next use captures again."""
        with self.device_context():
            return self.runner.release()

    def close(self) -> None:
        """End all requests and free graphs; the engine cannot be used afterwards."""
        if self._dead is None:
            self.scheduler.reset(FinishReason.ABORT)
            self.outputs.fail(None)
            self._inflight.clear()
            if self._profile is not None:
                self._profile.save(self.plan.book)
            self.runner.close()
            self._dead = EngineDeadError("this LLM was closed; make a new one")

    # --- what it is and what it did ----------------------------------------------------

    @property
    def why_no_graphs(self) -> str | None:
        """Why no step of this engine can run on a graph; None if steps can."""
        if self.plan.mode is not CudaGraphMode.NONE:
            return None
        if self.config.debug_graphs:
            return "debug_graphs=True runs every step op by op"
        if self.config.device.type != "cuda":
            return "CUDA graphs need an NVIDIA GPU, and this runs on the CPU"
        return "enforce_eager=True, enable_cuda_graph=False or cudagraph_mode='NONE' was asked for"

    def metrics(self) -> dict[str, Any]:
        """Counters since the start; plain data."""
        plan, scheduler = self.plan, self.scheduler
        return {
            "num_requests_running": scheduler.num_running,
            "num_requests_waiting": scheduler.num_waiting,
            "num_preemptions": scheduler.num_preemptions,
            "kv_cache_usage": scheduler.allocator.usage,
            "graph_steps": {str(key): count for key, count in plan.graph_steps.items()},
            "eager_steps": {reason.value: count for reason, count in plan.eager_steps.items()},
            "delayed_steps": {why.value: count for why, count in scheduler.delayed_steps.items()},
            "memory_bytes": {line.name: line.nbytes for line in self.memory},
            "startup_seconds": dict(self.startup),
        }


def _names(prompt_id: str, params: SamplingParams) -> list[str]:
    """Ids of a prompt's requests."""
    return [prompt_id] if params.n == 1 else [f"{prompt_id}-{i}" for i in range(params.n)]


# --- building --------------------------------------------------------------------------


class _Stages:
    """Seconds of each stage of the start, logged as they end with the bytes that they took."""

    def __init__(self, memory: Sequence[MemoryLine]) -> None:
        self.seconds: dict[str, float] = {}
        self._memory, self._lines = memory, 0
        self._last = time.perf_counter()

    def done(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        nbytes = sum(line.nbytes for line in self._memory[self._lines :])
        self._lines = len(self._memory)
        logger.info("start: %s, %.3f s, %d bytes", name, self.seconds[name], nbytes)


def build(options: EngineOptions, backend: GraphBackend | None = None) -> Engine:
    """Make an engine. The order of what follows is the memory order; each line reports its bytes.

    Args:
        options: what the user asked for.
        backend: what captures and replays graphs; None: CUDA's, where there is a GPU.

    Raises:
        ConfigError, ModelError: before anything large is loaded, wherever that is possible.
    """
    from .models.decoder import load, random_decoder
    from .models.registry import spec_from_config

    memory: list[MemoryLine] = []
    stages = _Stages(memory)
    checkpoint, model_config = _open(options)
    spec = spec_from_config(model_config)
    config = resolve(
        options,
        model_dtype=model_config.get("dtype") or model_config.get("torch_dtype"),
        model_positions=spec.max_positions,
        graphs_anywhere=backend is not None,
    )
    device = config.device
    stages.done("open")

    with ThreadPoolExecutor(3) as pool, torch.inference_mode():
        tokenizer = _start_tokenizer(pool, options, checkpoint)
        selected = pool.submit(select, device)  # imports what a GPU needs while the weights load
        if device.type == "cuda":
            pool.submit(_open_kernel_cache)
        model: Decoder
        if checkpoint is None:
            model = random_decoder(
                spec,
                dtype=config.dtype,
                device=device,
                positions=config.max_model_len,
                seed=config.seed,
                quantization=config.quantization,
            )
        else:
            model = load(
                spec,
                checkpoint,
                dtype=config.dtype,
                device=device,
                positions=config.max_model_len,
                quantization=config.quantization,
            )
        memory.append(MemoryLine("weights", model.nbytes))
        stages.done("weights")
        ops = selected.result()
        if config.debug_graphs:
            from .graphs.debug import DebugOps

            ops = DebugOps(ops).ops
        stages.done("ops")

        arena = Arena(
            max_tokens=config.max_num_batched_tokens,
            max_seqs=config.max_num_seqs,
            hidden=spec.hidden_size,
            intermediate=spec.intermediate_size,
            vocab=spec.vocab_size,
            attention=spec.attention,
            ops=ops,
            dtype=config.dtype,
            device=device,
        )
        memory.append(MemoryLine("arena", arena.nbytes))
        shapes = BufferShapes(
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=config.max_num_batched_tokens,
            max_blocks_per_seq=config.max_blocks_per_seq,
            block_size=config.block_size,
            vocab_size=spec.vocab_size,
        )
        buffers = StepBuffers(shapes, device, config.pipeline_depth)
        memory.append(MemoryLine("static inputs and step state", buffers.nbytes))
        padded = (
            device.type == "cuda"
            or config.strict
            or config.debug_graphs
            or config.cudagraph_mode is not CudaGraphMode.NONE
        )
        plan = Plan(
            mode=config.cudagraph_mode,
            capture_sizes=config.capture_sizes,
            book=KeyBook(min_hits=config.cudagraph_min_hits, budget=config.cudagraph_memory_budget),
            pad=padded,
            token_sizes=default_token_sizes(config.max_prefill_tokens),
            prefill_seqs=default_prefill_seqs(config.max_num_seqs),
            token_multiple=16 if padded else 1,
            fail_on_fallback=config.fail_on_fallback,
        )
        for hole in plan.holes(config.max_num_seqs):
            logger.warning("%s", hole)
        # A stream of the engine's own: capture is not allowed on the default one.
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        ring = ResultRing(buffers, stream)
        context = _device_context(stream)

        def program_over(num_blocks: int) -> StepProgram:
            cache = KVCache.allocate(
                layers=spec.num_layers,
                num_blocks=num_blocks,
                block_size=config.block_size,
                kv_heads=spec.attention.kv_heads,
                head_dim=spec.attention.head_dim,
                dtype=config.dtype,
                device=device,
            )
            return StepProgram(model, cache, arena, ops)

        addresses = AddressBook()
        if device.type == "cuda":
            addresses.observe()
            with context():
                ops.load(model, config.block_size, config.max_blocks_per_seq, config.max_num_seqs)
                ops.tune(model, config.max_num_seqs)
                stages.done("kernel versions")
                _warm_up(program_over(1), buffers)
            addresses.observe("library workspace")  # what warm-up left behind is the libraries' and the ops'
            own = sum(t.numel() * t.element_size() for t in ops.workspaces().values())
            memory.append(MemoryLine("workspaces of kernels", own))
        stages.done("warm-up")
        graphs = config.cudagraph_mode is not CudaGraphMode.NONE
        predicted = None
        if graphs:
            if backend is None:
                from .graphs.cuda import TorchBackend

                backend = TorchBackend()
            with context():
                predicted = _predict_graphs(backend, program_over(1), buffers, plan)
        scratch, save_area = 0, None
        if graphs and config.cudagraph_verify:
            scratch = _scratch_blocks(config)
            save_area = torch.empty((2, len(buffers.words)), dtype=torch.int32, device=device)
            memory.append(MemoryLine("save area of trials", save_area.numel() * save_area.element_size()))
        config, num_blocks = _size_cache(config, spec, memory, scratch)
        program = program_over(num_blocks + scratch)
        kv_bytes = program.cache.data.numel() * program.cache.data.element_size()
        trial_bytes = kv_bytes // (num_blocks + scratch) * scratch
        memory.append(MemoryLine("KV cache", kv_bytes - trial_bytes))
        if scratch:
            memory.append(MemoryLine("KV blocks for trials", trial_bytes))
        stages.done("KV cache")
        blocks = range(num_blocks, num_blocks + scratch)
        runner = _make_runner(config, program, ring, plan, buffers, blocks, addresses, backend, save_area)
        taken = _reserved(device)
        with context():
            runner.rehearse(_rehearsals(plan))
        if device.type == "cuda" and save_area is not None:
            memory.append(MemoryLine("memory of trials", _reserved(device) - taken))
        stages.done("rehearsal")
        words = tokenizer.result()
        stages.done("tokenizer")
        name = checkpoint.path.name if checkpoint else str(options.model)
        profile = _profile(config, name) if graphs else None
        if graphs and config.cudagraph_capture != "lazy":
            assert profile is not None
            with context():
                _capture_early(config, plan, runner, profile)
            stages.done("capture")

    allocator = BlockAllocator(num_blocks, config.block_size, config.enable_prefix_caching)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        ),
        allocator,
        plan.pad_seqs,
    )
    return Engine(
        name=name,
        config=config,
        spec=spec,
        tokenizer=words,
        eos_token_ids=_eos_ids(checkpoint, words, spec.vocab_size),
        scheduler=scheduler,
        plan=plan,
        buffers=buffers,
        runner=runner,
        context=context,
        memory=memory,
        startup=stages.seconds,
        profile=profile,
        predicted_graph_bytes=predicted,
    )


def _open(options: EngineOptions) -> tuple[Checkpoint | None, Mapping[str, Any]]:
    """The checkpoint (none with random weights) and the model's config."""
    if options.load_format == "dummy":
        from .models.shapes import SHAPES

        return None, SHAPES[options.model] if options.model in SHAPES else _own_config(options, SHAPES)
    from .models.checkpoint import open_checkpoint
    from .models.hub import resolve as find

    checkpoint = open_checkpoint(find(options.model, options.revision))
    return checkpoint, checkpoint.config


def _own_config(options: EngineOptions, shapes: Collection[str]) -> Mapping[str, Any]:
    """The config.json of the folder or hub model that is to get random weights.

    Raises:
        ModelError: there is none; the message names the `shapes` where one of them may have been meant.
    """
    from .models.checkpoint import read_json
    from .models.hub import DEFAULT_MODEL_NAME
    from .models.hub import resolve as find

    def refused(why: str, meant: str) -> ModelNotFoundError:
        near = suggest(meant.lower(), shapes)
        return ModelNotFoundError(
            f"load_format='dummy' needs a shape ({', '.join(shapes)}) or a model with a config.json, and {why}"
            f"{near if 'did you mean' in near else ''}"
        )

    name = options.model
    if name in (None, "default", DEFAULT_MODEL_NAME):
        raise refused("the default model has none", DEFAULT_MODEL_NAME)
    try:
        path = find(name, options.revision)
    except ModelNotFoundError as error:
        if "/" in name:  # a path, or a hub id that the hub has more to say about
            raise
        raise refused(f"{name[:200]!r} is neither", name[:200]) from error
    if path.is_file():
        raise refused(f"{path} is a file", path.stem)
    return read_json(path / "config.json")


def _start_tokenizer(
    pool: ThreadPoolExecutor, options: EngineOptions, checkpoint: Checkpoint | None
) -> Future[Tokenizer | None]:
    """Load the tokenizer while the weights load."""

    def load() -> Tokenizer | None:
        if options.tokenizer is not None:
            from .models.hub import resolve as find
            from .tokenizer import Tokenizer

            return Tokenizer.load(find(options.tokenizer, options.revision))
        return None if checkpoint is None or options.skip_tokenizer_init else checkpoint.load_tokenizer()

    return pool.submit(load)


def _eos_ids(checkpoint: Checkpoint | None, tokenizer: Tokenizer | None, vocab_size: int) -> frozenset[int]:
    """Tokens that end a sequence: the union of what the model's files say.

    Raises:
        CheckpointError: an eos_token_id is no token id, or there are too many.
    """
    found = set(tokenizer.eos_token_ids) if tokenizer else set()
    if checkpoint is not None:
        for where, source in (
            ("config", checkpoint.config),
            ("generation config", checkpoint.generation_config),
        ):
            value = source.get("eos_token_id")
            listed = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if any(isinstance(t, bool) or not isinstance(t, int) for t in listed):
                raise CheckpointError(
                    f"{checkpoint.path}: eos_token_id in the {where} must be a token id or a list of them, "
                    f"got {value!r}"
                )
            found.update(listed)
    ends = frozenset(t for t in found if 0 <= t < vocab_size)
    if len(ends) > MAX_STOP_IDS:
        raise CheckpointError(f"eos_token_id names {len(ends)} tokens, at most {MAX_STOP_IDS} are supported")
    return ends


def _device_context(stream: torch.cuda.Stream | None) -> Callable[[], AbstractContextManager[Any]]:
    """What device work is done in: the engine's stream on a GPU."""
    if stream is None:
        return torch.inference_mode
    entered = threading.local()
    get, put, device = torch._C._cuda_getCurrentStream, torch._C._cuda_setStream, stream.device_index
    own = {"stream_id": stream.stream_id, "device_index": device, "device_type": stream.device_type}

    class Enter:
        """What `torch.cuda.stream` does, in a tenth of its time, where the device is the current one already."""

        def __enter__(self) -> None:
            self._inference = torch.inference_mode()
            self._inference.__enter__()
            self._slow = None
            if torch._C._cuda_getDevice() == device:
                self._before = get(device)
                put(**own)
            else:
                self._slow = torch.cuda.stream(stream)
                self._slow.__enter__()
            entered.yes = True

        def __exit__(self, *error: Any) -> None:
            entered.yes = False
            if self._slow is None:
                put(**dict(zip(own, self._before, strict=True)))
            else:
                self._slow.__exit__(*error)
            self._inference.__exit__(*error)

    nothing = contextlib.nullcontext()
    # A call that runs many steps has entered it for all of them.
    return lambda: nothing if getattr(entered, "yes", False) else Enter()


def _open_kernel_cache() -> None:
    from .ops.triton.compile import open_cache

    open_cache()


def _warm_up(program: StepProgram, buffers: StepBuffers) -> None:
    """Compile and load kernels and make library workspaces, on rows that are all padding."""
    from .ops.triton.compile import compile_ahead

    most_tokens, most_seqs = buffers.shapes.max_num_tokens, buffers.shapes.max_num_seqs

    def run(
        kind: StepKind, tokens: int, seqs: int = 1, variant: SamplerVariant = SamplerVariant.GREEDY
    ) -> None:
        route = Route(GraphKey(kind, tokens, seqs, variant), None)
        program(buffers.write(Schedule(0, kind, (), (), (), variant), route))

    def steps() -> None:
        for variant in SamplerVariant:
            run(StepKind.MIXED, min(16, most_tokens), variant=variant)
            run(StepKind.DECODE, 1, variant=variant)
        run(StepKind.MIXED, most_tokens)  # the largest workspaces

    # The arena is still zeroed here, so that what the block runs among kernels that do not is harmless.
    with compile_ahead():
        steps()
        for power in range(1, most_seqs.bit_length()):  # other batch sizes may have other kernels
            run(StepKind.DECODE, 1 << power, 1 << power)
        run(StepKind.DECODE, most_seqs, most_seqs)
    torch.cuda.synchronize()
    steps()
    torch.cuda.synchronize()


def _predict_graphs(
    backend: GraphBackend, program: StepProgram, buffers: StepBuffers, plan: Plan
) -> int | None:
    """Bytes that executables of the greedy ladder will take, from the nodes of one step; None if it cannot be captured."""
    ladder = plan.ladder(SamplerVariant.GREEDY)
    if not ladder:
        return 0
    key = min((key for key in ladder if key.kind is StepKind.DECODE), key=lambda k: k.num_seqs)
    try:
        graph = backend.capture(lambda: program(buffers.batch(Route(key, None))))
    except Exception as error:  # reported when traffic asks for the key, with its consequences
        logger.debug("no step could be captured to count its nodes: %r", error)
        return None
    nodes = backend.num_nodes(graph)
    backend.destroy(graph)
    predicted = plan.book.predict(nodes * len(ladder))
    if predicted > plan.book.budget:
        logger.warning(
            "graphs of the %d greedy keys will take about %.0f MiB, cudagraph_memory_budget has %.0f MiB: "
            "the least useful ones will have to go",
            len(ladder),
            predicted / 2**20,
            plan.book.budget / 2**20,
        )
    return predicted


def _rehearsals(plan: Plan) -> list[GraphKey]:
    """Keys that between them use all that trials use: the largest decode step, each sampler, prompts."""
    if plan.mode is CudaGraphMode.NONE or not plan.capture_sizes:
        return []
    small, large = plan.capture_sizes[0], plan.capture_sizes[-1]
    sizes = zip(SamplerVariant, (large, small, small), strict=True)
    keys = [GraphKey(StepKind.DECODE, size, size, sampler) for sampler, size in sizes]
    prompts = [key for key in plan.ladder(SamplerVariant.GREEDY) if key.kind is StepKind.MIXED]
    return keys + prompts[-1:]


def _reserved(device: torch.device) -> int:
    """Bytes that torch has taken from the driver."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _scratch_blocks(config: EngineConfig) -> int:
    """KV blocks for trials: one to write for each row or enough for the longest captured prompts, and contexts."""
    from .graphs.scratch import SHARED_BLOCKS

    return max(config.max_num_seqs, 2 * config.max_prefill_tokens // config.block_size) + SHARED_BLOCKS


def _size_cache(
    config: EngineConfig, spec: ModelSpec, memory: Sequence[MemoryLine], scratch: int
) -> tuple[EngineConfig, int]:
    """How many blocks requests get, and the longest sequence that then fits.

    `scratch` blocks for trials and the budget of the executables are set aside first.
    """
    a, size = spec.attention, config.block_size
    per_block = KVCache.bytes_per_block(spec.num_layers, size, a.kv_heads, a.head_dim, config.dtype)
    # Every sequence at full length, and the guard block: more could never be used.
    useful = config.max_num_seqs * config.max_blocks_per_seq + 1
    if config.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(config.device)
        room = int(total * config.gpu_memory_utilization) - (total - free) - scratch * per_block
        if config.cudagraph_mode is not CudaGraphMode.NONE:
            room -= config.cudagraph_memory_budget
        advice = (
            "raise gpu_memory_utilization, lower max_num_seqs or max_num_batched_tokens, or free GPU memory"
        )
        default = room
    else:
        room = available_memory()
        default = min(_CPU_CACHE_BYTES, room // 2)
        advice = "use a smaller model or a machine with more memory"
    asked, given = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    if config.num_blocks_override is not None:
        blocks, given = config.num_blocks_override, "num_gpu_blocks_override"
        asked = blocks * per_block
    else:
        blocks = min((asked if asked is not None else max(default, 0)) // per_block, useful)
    if asked is not None:
        if asked > max(room, 0):
            raise KVCacheError(
                f"the KV cache was asked to take {asked / 2**20:,.0f} MiB, but only {max(room, 0) / 2**20:,.0f} MiB "
                f"are left: lower {given}"
            )
        advice = f"raise {given}"
    fits = (blocks - 1) * size
    if fits < min(config.max_model_len, 2):
        if asked is not None:
            least = 2 if config.num_blocks_override is not None else 2 * per_block
            raise KVCacheError(
                f"no room for a KV cache: {given} allows {blocks} block{'' if blocks == 1 else 's'} of {per_block:,} "
                f"bytes, and 2 are the least; {advice} to {least} or more"
            )
        used = ", ".join(f"{line.name} {line.nbytes / 2**20:,.0f} MiB" for line in memory)
        raise KVCacheError(
            f"no room for a KV cache: {max(room, 0) / 2**20:,.0f} MiB are left, a block takes "
            f"{per_block / 2**20:,.2f} MiB ({used}); {advice}"
        )
    if fits < config.max_model_len:
        if config.source["max_model_len"] == "user":
            raise KVCacheError(
                f"max_model_len={config.max_model_len} needs {config.max_blocks_per_seq + 1} KV blocks, but only "
                f"{blocks} fit: use max_model_len={fits} or less, or {advice}"
            )
        logger.warning(
            "max_model_len is %d instead of the model's %d: that is what the KV cache holds",
            fits,
            config.max_model_len,
        )
        config = config.with_max_model_len(fits)
    return config, blocks


def _profile(config: EngineConfig, model: str) -> Profile:
    """What traffic used last time with this model, device and config."""
    from .paths import cache_dir

    gpu = torch.cuda.get_device_name(config.device) if config.device.type == "cuda" else "cpu"
    identity = {
        "model": model,
        "device": gpu,
        "dtype": str(config.dtype),
        "quantization": config.quantization,
        "max_num_seqs": config.max_num_seqs,
        "capture_sizes": list(config.capture_sizes),
        "max_prefill_tokens": config.max_prefill_tokens,
    }
    return Profile(cache_dir() / "graphs", identity)


def _capture_early(config: EngineConfig, plan: Plan, runner: Runner, profile: Profile) -> None:
    """Capture before there is traffic: the whole greedy ladder, or what the profile remembers."""
    if config.cudagraph_capture == "startup":
        keys = plan.ladder(SamplerVariant.GREEDY)
    else:
        keys = [key for key in profile.load() if plan.can_fire(key)]
    runner.prepare(keys)


def _make_runner(
    config: EngineConfig,
    program: StepProgram,
    ring: ResultRing,
    plan: Plan,
    buffers: StepBuffers,
    scratch: Sequence[int],
    addresses: AddressBook,
    backend: GraphBackend | None,
    save_area: torch.Tensor | None,
) -> Runner:
    if config.cudagraph_mode is not CudaGraphMode.NONE:
        from .graphs.graph_runner import GraphRunner

        assert backend is not None, "made before the KV cache was sized"
        return GraphRunner(program, ring, buffers, plan.book, scratch, addresses, backend, save_area, config)
    if config.strict:
        from .graphs.strict import StrictRunner

        return StrictRunner(program, ring, buffers)
    return EagerRunner(program, ring)


__all__ = ["Engine", "MemoryLine", "build"]
