"""Two gloo workers take the same steps as one worker alone: weights, metrics, balance loss, preference baselines."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparsight.distill.balance import Balance, balance_loss
from sparsight.distill.loop import StageTrainer
from sparsight.distill.preference import kto_baselines, preference
from sparsight.stages import PreferenceConfig, TermsConfig
from tests.parity.preference_case import pair_trainer, ratios, stage
from tests.parity.streams_case import clips_trainer
from tests.parity.text_only_case import MIXED, mixed_trainer, text_alone
from tests.parity.training_case import trainer, weights

PICTURES = MIXED.model_copy(
    update={"terms": TermsConfig(cross_entropy=0.5, forward_kl=1.0, visual_kl=0.7, relation=0.5, attention=0.3)}
)
CASES: dict[str, Callable[[], StageTrainer]] = {
    "answers": trainer,
    "answers, some without pictures": mixed_trainer,
    "pictures, some without": lambda: mixed_trainer(PICTURES),
    "clips, some with questions whose evidence is known": clips_trainer,
    "pairs, teacher as reference": lambda: pair_trainer(stage("kto_pair", "teacher")),
    "pairs, student as reference": lambda: pair_trainer(stage("kto_pair", "student")),
}


def run(case: str) -> dict[str, Any]:
    trained = CASES[case]()
    start = weights(trained)
    metrics = [trained.train_step() for _ in range(trained.total_steps)]
    return {"start": start, "weights": weights(trained), "metrics": metrics}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def alone(case: str) -> dict[str, Any]:
    return run(case)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two worker processes, which meet through a file, ended with."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {case: run(case) for case in CASES}
    balance, grad_TE = balance_of(slice(0, 5) if rank == 0 else slice(5, None))
    found["balance"] = [balance.loss.detach(), balance.value.detach(), balance.load_LE, grad_TE]
    found["kto"] = kto_of(slice(0, 2) if rank == 0 else slice(2, None))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def balance_of(part: slice) -> tuple[Balance, torch.Tensor]:
    """Balance loss and its gradient for a part of 12 routed tokens."""
    logits_TE = torch.randn(12, 4, generator=torch.Generator().manual_seed(2))
    mask_T = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1])
    chosen_TA = logits_TE.topk(2).indices
    mine_TE = logits_TE[part].clone().requires_grad_()
    balance = balance_loss({0: mine_TE}, {0: chosen_TA[part]}, mask_T[part])
    return balance, torch.autograd.grad(balance.loss, mine_TE)[0]


def kto_of(part: slice) -> dict[str, torch.Tensor]:
    """Baselines, losses and gradients of a part of the pairs."""
    mine = torch.from_numpy(ratios()[:, part]).requires_grad_()
    losses_B = preference(mine[0], mine[1], PreferenceConfig(loss="kto_pair", beta=0.3)).losses_B
    baselines = torch.stack(kto_baselines(mine[0], mine[1]))
    return {"z": baselines, "losses": losses_B.detach(), "grad": torch.autograd.grad(losses_B.sum(), mine)[0]}


def test_workers_together_take_the_steps_of_one(
    case: str, alone: dict[str, Any], together: list[dict[str, Any]]
) -> None:
    together = [results[case] for results in together]
    moved = max(float((alone["weights"][name] - alone["start"][name]).abs().max()) for name in alone["start"])
    assert moved > 3e-3
    for name, value in alone["weights"].items():
        assert torch.equal(together[0]["weights"][name], together[1]["weights"][name])
        torch.testing.assert_close(together[0]["weights"][name], value, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(together[0]["metrics"], alone["metrics"], strict=True):
        expected = {name: figure for name, figure in theirs.items() if name != "tokens_per_s"}
        assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_worker_without_pictures_is_among_the_cases() -> None:
    """Beside one with a picture, in either order or both without: one row a worker and step."""
    case = mixed_trainer()
    shares = {tuple(text_alone(case, case.order.batch(step))) for step in range(case.total_steps)}
    assert {(False, True), (True, True), (False, False)} <= shares


def test_the_baselines_of_kto_are_of_the_whole_batch(together: list[dict[str, Any]]) -> None:
    whole = kto_of(slice(None))
    first, second = (result["kto"] for result in together)
    assert float(whole["z"][0]) > 1.0
    assert torch.equal(first["z"], second["z"])
    torch.testing.assert_close(first["z"], whole["z"], atol=1e-12, rtol=0)
    torch.testing.assert_close(torch.cat([first["losses"], second["losses"]]), whole["losses"])
    torch.testing.assert_close(torch.cat([first["grad"], second["grad"]], dim=1), whole["grad"])


def test_the_balance_loss_is_of_the_whole_batch(together: list[dict[str, Any]]) -> None:
    whole, grad_TE = balance_of(slice(None))
    first, second = (result["balance"] for result in together)
    torch.testing.assert_close((first[0] + second[0]) / 2, whole.loss.detach())
    torch.testing.assert_close(torch.cat([first[3], second[3]]) / 2, grad_TE)
    for part in (first, second):
        torch.testing.assert_close(part[1], whole.value.detach())
        torch.testing.assert_close(part[2], whole.load_LE)
