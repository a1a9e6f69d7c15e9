"""The variants of the training benchmark have the same losses in every step, with and without a feature cache."""

import copy

import torch

from benchmarks.train import LOSSES, STAGES, Variant, apart, make_batches, our_losses, plain_losses, table
from trainers.arguments import ModelArguments
from trainers.feature_cache import FeatureCache
from trainers.freezing import prepare_for_training


def test_variants_have_equal_losses_and_stages_that_add_up(make_model, processor, tmp_path):
    from benchmarks._workload import make_rows

    batches, base, variants = make_batches(processor, make_rows(4)), make_model(), {}
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    for name, losses in (("plain", plain_losses), ("ours", our_losses), ("cache, float16", our_losses)):
        torch.manual_seed(0)
        peft = prepare_for_training(copy.deepcopy(base), ModelArguments()).train()
        cache = FeatureCache(tmp_path, peft.base_model.model) if name.startswith("cache") else None
        variants[name] = Variant(peft, losses, name != "plain", cache)
    for number, batch in enumerate(batches):
        for variant in variants.values():
            variant.step(batch, number)
    assert variants["cache, float16"].cache.misses == 4
    plain = variants["plain"].history
    assert len(plain) == 2 and plain[0] != plain[1] and all(value > 0 for step in plain for value in step.values())
    assert max(apart(variants["ours"], variants["plain"]).values()) < 1e-4
    assert (
        max(apart(variants["cache, float16"], variants["plain"]).values()) < 2e-2
    )  # larger weights than workload M's
    for variant in variants.values():
        for spent in variant.seconds:
            parts = spent["forward"] + spent["backward"] + spent["AdamW"]
            assert 0 < parts <= spent["all"] <= 1.5 * parts and set(STAGES) <= {*spent, "SAM encoder", "CLIP"}
    result = {
        "median_seconds": {name: {stage: variant.seconds[1].get(stage, 0.0) for stage in STAGES} for name, variant in variants.items()},
        "speedup": {"ours": 2.0},
        "relative_difference": {"ours": dict.fromkeys(LOSSES, 1e-3)},
        "workload": {"steps": 2}, "floor_seconds": {"language model": 1.0, "AdamW": 0.5}, "fill_seconds_per_batch": 1.0,
        "machine": {"busy_elsewhere": 0.5},
    }  # fmt: skip
    told = table(result)
    assert "ours: 2.00 times as fast" in told and "NOT EQUAL" in told and "measure again" in told and "1.50 s" in told
