"""The words a node and a worker exchange over the inherited control socket.

    node -> worker   Segments, Prepare, Load, Generate, Cancel, Ping, Quiesce, Resume, LoadAdapter, UnloadAdapter
    worker -> node   Hello, Prepared, Loaded, Delta, Finished, Failed, Pong, Quiesced, Resumed, WorkerError,
                     AdapterLoaded, AdapterUnloaded, AdapterFailed

A worker says `Hello` first (also: never again after a restore, the socket's peer is new but the process is not). The
node answers with one `Load` (cold start), or with `Prepare` and then perhaps one `Load`. After `Loaded`, any number of
`Generate` may be in flight. `Quiesce` is sent only when the node has no request in flight; after `Quiesced` the worker
touches nothing until `Resume` arrives. `Resumed` ends either.

`Segments` hands over the memory that holds the weights, and has no answer. Its frame carries descriptors
(transfer/handles.py). It comes right before the `Load` or `Resume` that needs it, or earlier (the first frame of all),
so that the worker starts or is restored while the memory is being filled. Quiescing lets go of all segments, so every
`Resume` of a model with weights has its `Segments` before it.

`LoadAdapter` and `UnloadAdapter` may come at any time between `Loaded` (or `Resumed`) and `Quiesce`, also while
requests run; each has its answer, by name. The segment of an adapter, filled, comes with an `AdapterSegment` right
before its `LoadAdapter`. Quiescing drops all adapters: who wants one after `Resumed` loads it again.

Every struct is encoded as one msgpack map with its type under "type" and travels in one frame (frames.py). Unknown
fields and wrong types are refused when decoding: both ends are always the same version of this package, and
`Hello.version` proves it.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dormouse.checkpoint.tensors import CheckpointBody
from dormouse.phases import Phases
from dormouse.transfer.handles import SegmentInfo

PROTOCOL_VERSION = 2


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen. `temperature == 0` is greedy; `top_k == 0` and `top_p == 1` are off.

    `logprobs` is None for none, else the number of alternatives wanted beside the chosen token (0..20).
    A request with the same prompt, sampling and `seed` gives the same tokens whatever else runs in the batch.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


class ChatPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="chat"):
    """OpenAI chat messages, rendered by the model's own chat template in the worker."""

    messages: list[dict[str, Any]]


class TextPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """Plain text, tokenised as the model's tokenizer does by default."""

    text: str


class TokensPrompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="tokens"):
    """Token ids, taken as they are."""

    ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokensPrompt


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    pass


# node -> worker


class Segments(_Message, frozen=True, tag="segments"):
    """The segments of the worker's model; the descriptors of all of them come with this frame, in order."""

    segments: list[SegmentInfo]


class Prepare(_Message, frozen=True, tag="prepare"):
    """Import and warm an engine without a model; a `Load` of the same engine, device and threads may follow."""

    engine: str
    device: str = "cpu"
    threads: int | None = None


class Load(_Message, frozen=True, tag="load"):
    """Load a model. `path` is the folder of an imported model; `context` and `kv_tokens` of None mean the defaults.
    `kv_share` is for GPUs, in place of `kv_tokens`: the part of the GPU's memory that the cache takes."""

    engine: str
    path: str
    device: str = "cpu"
    threads: int | None = None
    context: int | None = None
    kv_tokens: int | None = None
    kv_share: float | None = None


class Generate(_Message, frozen=True, tag="generate"):
    """Start one generation. `id` is unique among those in flight; `adapter` is one that has been loaded."""

    id: str
    prompt: Prompt
    sampling: Sampling
    adapter: str | None = None


class Cancel(_Message, frozen=True, tag="cancel"):
    """Stop a generation; answered by its `Finished` with reason "cancel". Unknown ids are ignored."""

    id: str


class Ping(_Message, frozen=True, tag="ping"):
    """Answer `Pong`: nothing has been heard while something is being generated."""


class Quiesce(_Message, frozen=True, tag="quiesce"):
    """Park: finish what runs, drop caches, point stdout and stderr at /dev/null, answer `Quiesced`."""


class Resume(_Message, frozen=True, tag="resume"):
    """Go on after a capture that failed or a restore. `log_path` is where stdout and stderr go from now on."""

    log_path: str


class AdapterSegment(_Message, frozen=True, tag="adapter_segment"):
    """The filled segment of the adapter that the next `LoadAdapter` loads; its descriptor comes with this frame, which
    is short, so that it can be sent at once."""

    segment: SegmentInfo


class LoadAdapter(_Message, frozen=True, tag="load_adapter"):
    """Have an adapter for requests that name it. `table` says where its factors lie in the segment, `scalings` which
    modules they belong to (checkpoint/adapters.py). One of this name that is loaded already is answered as if it had
    been loaded now."""

    name: str
    table: CheckpointBody
    scalings: dict[str, float]


class UnloadAdapter(_Message, frozen=True, tag="unload_adapter"):
    """Let go of an adapter that no request in flight uses; one that is not there is gone already."""

    name: str


# worker -> node


class Hello(_Message, frozen=True, tag="hello"):
    """The worker is up and speaks `version`."""

    version: int
    pid: int


class Prepared(_Message, frozen=True, tag="prepared"):
    """The engine is ready for any of its models. `phases` are its steps."""

    phases: Phases


class Loaded(_Message, frozen=True, tag="loaded"):
    """The model is ready. `context` is the longest prompt + answer in tokens; `phases` are its steps; `device_bytes` is
    what it takes of a GPU while it is awake, weights included; `writable`: the driver does not protect the weights."""

    context: int
    kv_tokens: int
    phases: Phases
    device_bytes: int = 0
    writable: bool = False


class TokenLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One alternative at one position. `logprob` is natural; `text` is the token alone, decoded with replacement."""

    token_id: int
    text: str
    logprob: float


class Delta(_Message, frozen=True, tag="delta"):
    """New tokens of a generation and the text that became certain with them (may be empty: partial UTF-8 or a
    possible stop string is held back). `logprobs[i]` is token i's own value followed by its alternatives."""

    id: str
    token_ids: list[int]
    text: str
    logprobs: list[list[TokenLogprob]] | None = None


class Finished(_Message, frozen=True, tag="finished"):
    """The end of a generation. `reason` is "stop" (end token or stop string), "length" or "cancel"."""

    id: str
    reason: str
    prompt_tokens: int
    completion_tokens: int


class Failed(_Message, frozen=True, tag="failed"):
    """A generation that could not start or go on. `bad_request` tells the caller's fault from the worker's;
    `reason` is an OpenAI error code such as "context_length_exceeded"."""

    id: str
    message: str
    reason: str
    bad_request: bool
    param: str | None = None


class Pong(_Message, frozen=True, tag="pong"):
    """The worker still reads what it is sent."""


class Quiesced(_Message, frozen=True, tag="quiesced"):
    """Parked. `phases` are its steps."""

    phases: Phases


class Resumed(_Message, frozen=True, tag="resumed"):
    """Running again. `phases` are its steps, `device_bytes` and `writable` as in `Loaded`."""

    phases: Phases
    device_bytes: int = 0
    writable: bool = False


class WorkerError(_Message, frozen=True, tag="worker_error"):
    """A command failed, or the engine broke. `kind` is a class name in dormouse.errors."""

    message: str
    remedy: str
    kind: str = "EngineError"


class AdapterLoaded(_Message, frozen=True, tag="adapter_loaded"):
    """The next `Generate` may name the adapter."""

    name: str


class AdapterUnloaded(_Message, frozen=True, tag="adapter_unloaded"):
    """The adapter is gone and its segment unmapped."""

    name: str


class AdapterFailed(_Message, frozen=True, tag="adapter_failed"):
    """The adapter could not be loaded or unloaded; all else is as it was. `kind` is a class name in dormouse.errors."""

    name: str
    message: str
    remedy: str
    kind: str = "EngineError"


AdapterReply = AdapterLoaded | AdapterUnloaded | AdapterFailed
ToWorker = (
    Segments
    | Prepare
    | Load
    | Generate
    | Cancel
    | Ping
    | Quiesce
    | Resume
    | AdapterSegment
    | LoadAdapter
    | UnloadAdapter
)
FromWorker = (
    Hello
    | Prepared
    | Loaded
    | Delta
    | Finished
    | Failed
    | Pong
    | Quiesced
    | Resumed
    | WorkerError
    | AdapterLoaded
    | AdapterUnloaded
    | AdapterFailed
)
