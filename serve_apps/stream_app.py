"""The stream replica: a Serve shell around `stream_host`, with the streams' memory in an actor beside it.

What is acknowledged is in the `KvBankActor`, which the Serve controller owns: the replica may die and go on with the
same streams. Frames of one stream are taken one request after the other, also where a client leaves before its answer;
questions at any time. Methods return their result, or a `Refusal`. Deployed by `app`, called by `stream_routes`.
"""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import ray
from ray import serve
from ray.serve.config import DeploymentActorConfig

from actors.kv_bank_actor import KvBankActor, RemoteBanks
from actors.stream_banks import StreamInfo
from serve_apps.pictures import PictureLimits, load_picture
from serve_apps.refusals import Refusal, RequestRefusedError
from serve_apps.schemas import FramesRequest, QuestionRequest
from serve_apps.settings import ServiceSettings, load_student
from serve_apps.stream_host import FrameEncoder, QuestionAnswerer, StreamAnswer
from serve_apps.turns import Turns
from sparsight.errors import StreamError, StreamFullError
from sparsight.kv.attention import KvTextModel

P = ParamSpec("P")
T = TypeVar("T")

BANK = "kv_bank"


def bank_actor(settings: ServiceSettings) -> DeploymentActorConfig:
    """The actor that `StreamReplica` is deployed with."""
    stream = settings.serve.stream
    limits = {"max_streams": stream.max_streams, "max_stream_bytes": stream.max_stream_bytes}
    actor: Any = ray.remote(KvBankActor)
    return DeploymentActorConfig(name=BANK, actor_class=actor, init_kwargs=limits, actor_options={"num_cpus": 0})


class StreamReplica:
    def __init__(self, settings: ServiceSettings) -> None:
        model = load_student(settings)
        kv_model = KvTextModel(model.model.model.language_model)
        self._name = settings.name
        self._config = settings.serve
        self._limits = PictureLimits.of(settings.serve)
        self._encoder = FrameEncoder(model, kv_model, settings.serve.stream)
        self._answerer = QuestionAnswerer(model, kv_model, settings.serve.stream)
        self._turns = Turns()  # of each stream, for what changes it

    async def open(self) -> StreamInfo | Refusal:
        stream_id = f"stream_{uuid.uuid4().hex}"
        try:
            return await self._turns.take(stream_id, _refusing(self._open, stream_id))
        except asyncio.CancelledError:  # nobody has heard of the stream
            await self.close(stream_id)
            raise

    async def list(self) -> list[StreamInfo] | Refusal:
        return await asyncio.to_thread(_refusing(lambda: _banks().describe_all()))

    async def describe(self, stream_id: str) -> StreamInfo | Refusal:
        return await asyncio.to_thread(_refusing(_describe, stream_id))

    async def close(self, stream_id: str) -> StreamInfo | Refusal:
        """Forget the stream; returns what it was."""
        return await self._turns.take(stream_id, _refusing(self._close, stream_id))

    async def add_frames(self, stream_id: str, request: FramesRequest) -> StreamInfo | Refusal:
        """Keep all frames or none; the stream as it then is."""
        return await self._turns.take(stream_id, _refusing(self._add_frames, stream_id, request))

    async def ask(self, stream_id: str, request: QuestionRequest) -> StreamAnswer | Refusal:
        return await asyncio.to_thread(_refusing(self._ask, stream_id, request))

    def _open(self, stream_id: str) -> StreamInfo:
        info = _banks().open(stream_id, self._name, self._encoder.sink)
        if info is None:
            limit = self._config.stream.max_streams
            message = f"there are {limit} streams already, the limit: close one, or try again later"
            raise RequestRefusedError(Refusal(429, message, "too_many_streams", None, 30))
        return info

    def _close(self, stream_id: str) -> StreamInfo:
        self._encoder.forget(stream_id)
        info = _describe(stream_id)
        _banks().close(stream_id)
        return info

    def _add_frames(self, stream_id: str, request: FramesRequest) -> StreamInfo:
        limit = self._config.stream.max_frames_per_request
        if len(request.frames) > limit:
            message = f"the request holds {len(request.frames)} frames, the limit is {limit}"
            raise RequestRefusedError(Refusal(413, message, "too_many_frames", "frames"))
        info = _describe(stream_id)
        times_s = [frame.time_s for frame in request.frames]
        if info.span_s is not None and times_s[0] <= info.span_s[1]:
            message = f"a frame at {times_s[0]:g} s cannot follow the stream's last, at {info.span_s[1]:g} s"
            raise RequestRefusedError(Refusal(409, message, "frames_out_of_order", "frames.0.time_s"))
        pictures = [
            load_picture(frame.image, self._limits, f"frames.{index}.image")
            for index, frame in enumerate(request.frames)
        ]
        banks = _banks()
        try:
            blocks = self._encoder.encode(
                stream_id, info.frames, lambda tokens: banks.newest(stream_id, tokens), pictures, times_s
            )
            return banks.put(stream_id, blocks)
        except StreamError as error:
            _describe(stream_id)  # refuses where the stream itself is gone
            code = "stream_full" if isinstance(error, StreamFullError) else "frames_not_taken"
            raise RequestRefusedError(Refusal(409, str(error), code, "frames")) from None

    def _ask(self, stream_id: str, request: QuestionRequest) -> StreamAnswer:
        _describe(stream_id)
        limit = self._config.max_answer_tokens
        bank = _banks().bank(stream_id)
        try:
            return self._answerer.ask(bank, request.question, min(request.max_tokens or limit, limit), request.until_s)
        except StreamError as error:
            _describe(stream_id)
            raise RequestRefusedError(Refusal(409, str(error), "stream_not_answerable")) from None


def _banks() -> RemoteBanks:
    """Looked up each time, because the controller replaces an actor that died."""
    return RemoteBanks(serve.get_deployment_actor(BANK))


def _describe(stream_id: str) -> StreamInfo:
    info = _banks().describe(stream_id)
    if info is None:
        message = f"there is no stream '{stream_id[:100]}': open one with POST /v1/streams"
        raise RequestRefusedError(Refusal(404, message, "stream_not_found"))
    return info


def _refusing(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T | Refusal]:
    """The call with these arguments, to be made later; a refusal is its result, then."""

    def made() -> T | Refusal:
        try:
            return call(*args, **kwargs)
        except RequestRefusedError as refused:
            return refused.refusal

    return made
