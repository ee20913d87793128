"""The service as one Ray Serve application: an OpenAI-compatible endpoint for the student, next to streams.

`build` makes it from typed arguments (`serve run serve_apps.app:build model=…`, or a Serve config file), `main` runs it
on this machine: `python -m serve_apps.app --config configs/tiny.yaml` or `--model EXPORT`. Computes nothing itself.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.deployment import Application

from actors.runtime import connect, require
from serve_apps.ingress import Ingress
from serve_apps.settings import ServiceSettings, check_export
from serve_apps.stream_app import StreamReplica, bank_actor
from serve_apps.student_app import StudentReplica
from sparsight import layout
from sparsight.config import ResourcesConfig, ServeConfig, load
from sparsight.errors import ConfigError, SparsightError, one_line, user_error
from sparsight.observe import say

APPLICATION = "sparsight"
INGRESS_REQUESTS = 256
"""Requests that one ingress replica has in hand; those beyond what the models take are refused from there."""
STREAM_REQUESTS = 16
MODEL_REPLICAS = 2
"""Replicas that take `serve.threads` CPUs each: one for chats, one for streams."""
USER_ERROR = 2
INTERRUPTED = 130


def build(args: ServiceSettings) -> Application:
    """The application. Raises `ArtifactError` when the export is not finished."""
    check_export(args.model)
    config = args.serve
    model_options: dict[str, Any] = {
        "max_queued_requests": config.max_queued_requests,
        "ray_actor_options": {"num_cpus": config.threads},
    }
    student = _deployment(StudentReplica, max_ongoing_requests=2 * config.batch_requests, **model_options)
    streams = _deployment(
        StreamReplica, max_ongoing_requests=STREAM_REQUESTS, deployment_actors=[bank_actor(args)], **model_options
    )
    http: Any = serve.ingress()
    ingress = _deployment(http(Ingress), max_ongoing_requests=INGRESS_REQUESTS, ray_actor_options={"num_cpus": 0})
    return ingress.bind(args, int(time.time()), student.bind(args), streams.bind(args))


def _deployment(replica: Any, **options: Any) -> Any:
    deployment: Any = serve.deployment
    return deployment(name=replica.__name__, **options)(replica)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve a finished export over HTTP until interrupted.")
    parser.add_argument("--config", help="the YAML file of a run, whose export and serve settings are used")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", dest="overrides")
    parser.add_argument("--model", help="a finished export: a folder or s3:// URI; overrides the run's own")
    arguments = parser.parse_args(argv)
    try:
        settings, resources = _settings(arguments.config, arguments.overrides, arguments.model)
        application = build(settings)
        joined = bool(os.environ.get("RAY_ADDRESS"))
        if not joined:  # elsewhere the address belongs to other machines
            check_address(settings.serve)
        connect(resources.num_cpus)
        require_cpus(settings.serve, resources.start_timeout_s if joined else 0.0)  # one that is started here is fixed
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_number, signal.default_int_handler)
        _serve_until_interrupted(application, settings)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except Exception as error:
        mendable = user_error(error)
        if mendable is None:
            raise
        say(f"error: {one_line(mendable)}")
        return USER_ERROR
    return 0


def require_cpus(config: ServeConfig, timeout_s: float) -> None:
    """Raises `SparsightError` unless the connected cluster has the CPUs of the replicas, or gets them in time.

    Serve itself would wait for them without end.
    """
    remedy = "raise resources.num_cpus, or lower serve.threads"
    require(MODEL_REPLICAS * config.threads, 0.0, timeout_s, "the service", remedy)


def _serve_until_interrupted(application: Application, settings: ServiceSettings) -> None:
    """Answer until `KeyboardInterrupt`, then delete the application. One that comes before answers do is raised."""
    answers = False
    try:
        run(application, settings.serve)
        answers = True
        say(f"serving {settings.model} at http://{settings.serve.host}:{settings.serve.port}/v1 (Ctrl-C stops it)")
        threading.Event().wait()
    except KeyboardInterrupt:
        if APPLICATION in serve.status().applications:
            serve.delete(APPLICATION)
        if not answers:
            raise


def check_address(config: ServeConfig) -> None:
    """Raises `SparsightError` unless this machine can listen there.

    Serve itself would share the port with another Serve that holds it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
        try:
            probe.bind((config.host, config.port))
            probe.listen()
        except OSError as error:
            raise SparsightError(
                f"cannot listen at {config.host}:{config.port} ({error.strerror or error}): stop what listens there, "
                "or set serve.host and serve.port"
            ) from error


def run(application: Application, config: ServeConfig) -> None:
    """Deploy on the connected cluster and wait until requests are answered.

    Raises `SparsightError` where the proxy cannot listen or a replica does not start.
    """
    try:
        serve.start(http_options=HTTPOptions(host=config.host, port=config.port))
        serve.run(application, name=APPLICATION, route_prefix="/")
    except (RayError, RuntimeError, TimeoutError) as error:
        raise SparsightError(
            f"the service did not start at {config.host}:{config.port}: {_reason(error)}; Ray Serve's logs say more"
        ) from error


def _reason(error: Exception) -> str:
    """What a replica died of, or else the error: the last line, above it is a remote traceback."""
    deployments = [
        group for application in serve.status().applications.values() for group in application.deployments.values()
    ]
    said = [group.message for group in deployments if group.message]
    text = next(iter(said), str(error)).strip() or type(error).__name__
    return text.splitlines()[-1].rstrip(". ")


def _settings(
    config_path: str | None, overrides: Sequence[str], model: str | None
) -> tuple[ServiceSettings, ResourcesConfig]:
    """What is served, and the cluster to serve it on."""
    if config_path is None:
        if model is None or overrides:
            raise ConfigError("give --config FILE (with --set as needed), or --model EXPORT alone")
        return ServiceSettings(model=model), ResourcesConfig()
    config = load(config_path, overrides)
    name = config.distill.students[0].name
    export = model or f"{config.run_dir.rstrip('/')}/{layout.EXPORT}"
    return ServiceSettings(model=export, name=name, serve=config.serve), config.resources


if __name__ == "__main__":
    sys.exit(main())
