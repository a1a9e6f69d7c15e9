"""Every path on which a process may skip a part of the model, on two processes: the same collectives in the same order.

A process that skipped one would let the other wait until the time limit, and one that exchanged them would mix up gradients.
"""

import pytest
import torch
from two_processes import in_two, train

CASES = [
    ("no slot", "sam"),
    ("all rejected", "sam"),
    ("words", "sam"),
    ("kept features", "sam"),
    ("no slot", "sam2"),
    ("all rejected", "sam2"),
]
WAYS = ["fsdp2", *(pytest.param(way, marks=pytest.mark.deepspeed) for way in ("zero2", "zero3"))]
CARDS = pytest.param("cuda", marks=pytest.mark.gpu(2))


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """Gradients of both processes by way, kind and device; those of DDP are made once for the others."""
    folder = tmp_path_factory.mktemp("gradients")

    def of(way, kind, masks, device):
        path = folder / device / f"{kind} {masks}"
        path.mkdir(parents=True, exist_ok=True)
        if not (path / f"{way}-1.pt").exists():
            method = "spawn" if device == "cuda" else "fork"
            in_two(train, way, kind, masks, f"file://{path / way}", str(path), device, start_method=method)
        return [torch.load(path / f"{way}-{rank}.pt", weights_only=True) for rank in (0, 1)]

    return of


@pytest.mark.parametrize("device", ["cpu", CARDS])
@pytest.mark.parametrize(("kind", "masks"), CASES)
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_skips_a_part_trains_as_the_other_does(way, kind, masks, device, gradients):
    if (way, kind) == ("zero3", "kept features"):
        pytest.skip("each process gathers a tower when it runs it, so --feature_cache is refused (test_sharding.py)")
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    (ddp, other), (found, last) = gradients("ddp", kind, masks, device), gradients(way, kind, masks, device)
    assert ddp.keys() == other.keys() == found.keys() == last.keys()
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if device == "cpu" else {"atol": 1e-3, "rtol": 1e-3}
    for name, gradient in ddp.items():
        assert torch.equal(gradient, other[name]) and torch.equal(found[name], last[name]), name
        torch.testing.assert_close(found[name], gradient, **tolerance)
    assert any(float(gradient.abs().sum()) > 0 for name, gradient in ddp.items() if "mask_decoder" in name)


@pytest.mark.slow
def test_processes_may_be_spawned_as_on_cards(gradients, tmp_path):
    in_two(train, "ddp", "words", "sam", f"file://{tmp_path / 'store'}", str(tmp_path), "cpu", start_method="spawn")
    forked = gradients("ddp", "words", "sam", "cpu")[0]
    spawned = torch.load(tmp_path / "ddp-0.pt", weights_only=True)
    assert spawned.keys() == forked.keys() and all(torch.equal(spawned[name], forked[name]) for name in forked)
