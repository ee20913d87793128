"""Every shipped configuration loads, and the machines in cluster.yaml can offer what it asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparsight.config import RunConfig, load


def requests(config: RunConfig) -> dict[str, tuple[int, dict[str, float]]]:
    """What a run asks a cluster for: the number of workers of each kind, and the resources of one."""
    ask = config.resources
    return {
        "label": (ask.label_workers, {"CPU": ask.threads_per_worker, "GPU": ask.label_gpus}),
        "train": (ask.train_workers, {"CPU": ask.threads_per_worker, "GPU": float(ask.train_gpus)}),
    }


def room_for(request: Mapping[str, float], cluster: Mapping[str, Any]) -> int:
    """How many workers of this size fit when every group has grown to its limit."""
    total = 0
    for name, group in cluster["available_node_types"].items():
        offer = group["resources"]
        nodes = 1 if name == cluster["head_node_type"] else group.get("max_workers", 0)
        fits = [int(offer.get(kind, 0) // amount) for kind, amount in request.items() if amount > 0]
        total += nodes * min(fits)
    return total


def unmet(config: RunConfig, cluster: Mapping[str, Any]) -> list[str]:
    return [
        f"{kind}: asks for {count} workers of {size}, the cluster has room for {room_for(size, cluster)}"
        for kind, (count, size) in requests(config).items()
        if room_for(size, cluster) < count
    ]


def test_shipped_configs_load(repository: Path) -> None:
    paths = sorted((repository / "configs").glob("*.yaml"))
    assert "tiny.yaml" in [path.name for path in paths]
    for path in paths:
        load(path)


def test_the_cluster_offers_what_configs_ask(repository: Path) -> None:
    cluster = yaml.safe_load((repository / "cluster.yaml").read_text())
    problems = {path.name: unmet(load(path), cluster) for path in sorted((repository / "configs").glob("*.yaml"))}
    assert {name: found for name, found in problems.items() if found} == {}


def test_a_missing_machine_is_seen(repository: Path) -> None:
    config = load(
        repository / "configs" / "tiny.yaml",
        ["resources.label_workers=3", "resources.label_gpus=0.5", "resources.train_gpus=true"],
    )
    head = {"resources": {"CPU": 0}}
    small = {"max_workers": 1, "resources": {"CPU": 8, "GPU": 1}}
    cluster = {"head_node_type": "head", "available_node_types": {"head": head, "gpu": small}}
    assert [line.split(":")[0] for line in unmet(config, cluster)] == ["label", "train"]
    small["max_workers"] = 2
    assert unmet(config, cluster) == []
