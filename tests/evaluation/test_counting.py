"""Counts of masks on a device against those of arrays; the CPU stands for the device."""

import numpy as np
import pytest
import torch

from data_scripts.schema import decode_mask
from evaluation import EvaluationConfig, evaluate_rows
from evaluation.counting import count_masks
from evaluation.questions import Question


def drawn(seed, size, share, counted=False):
    generator = np.random.default_rng(seed)
    truth = generator.random(size) > share
    return Question(f"thing {seed}", truth, generator.random(size) > 0.3 if counted else None)


def answers(as_tensors):
    batch = []
    for seed, (size, count) in enumerate((((6, 9), 3), ((4, 4), 0), ((11, 5), 2))):
        questions = [drawn(10 * seed + n, size, (0.2, 0.9, 2.0)[n], counted=n == 1) for n in range(count)]
        masks = [np.random.default_rng(n).random(size) > (0.6, 2.0, -1.0)[n] for n in range(count)]
        results = [{"mask": torch.from_numpy(mask) if as_tensors else mask} for mask in masks]
        batch.append(({"image_id": str(seed)}, questions, results))
    return batch


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("show", [False, True])
def test_counts_of_tensors_are_those_of_arrays(encode, show):
    arrays, tensors = answers(False), answers(True)
    expected = count_masks(arrays, encode, show)
    assert count_masks(tensors, encode, show) == expected
    assert [len(of_image) for of_image in expected] == [3, 0, 2] and any(c.intersection for c in expected[0])
    assert all((counts.prediction is not None) == encode for of_image in expected for counts in of_image)
    for (_, questions, results), (_, _, others), of_image in zip(arrays, tensors, expected):
        for question, result, other, counts in zip(questions, results, others, of_image):
            assert torch.is_tensor(other["mask"]) != show
            assert np.array_equal(np.asarray(other["mask"]), result["mask"])
            assert (counts.intersection, counts.union) == question.overlap(result["mask"])
            assert (counts.box_intersection, counts.box_union) == question.box_overlap(result["mask"])
            if encode:
                assert np.array_equal(decode_mask(counts.prediction).astype(bool), result["mask"])


def test_a_mask_of_another_size_is_refused():
    row, questions, results = answers(True)[0]
    results[0]["mask"] = torch.zeros(5, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'thing 0' in image 0 is \(6, 9\), the image \(5, 9\)"):
        count_masks([(row, questions, results)], False, False)


@pytest.mark.parametrize("protocol", ["slots", "teacher_forced"])
def test_whole_evaluation_on_a_device(model, processor, rows, protocol, monkeypatch):
    config = EvaluationConfig(rows, "shapes", "test", protocol, batch_size=2)
    seen: dict[str, list] = {"host": [], "device": []}
    results = {}
    for name, stays in (("host", False), ("device", True)):
        monkeypatch.setattr("evaluation.loop.stays_on_device", lambda device, stays=stays: stays)

        def keep(index, row, questions, answered, name=name):
            seen[name] += [result["mask"] for result in answered]

        results[name] = evaluate_rows(model, processor, config, on_prediction=keep, keep_masks=True).rows
    assert results["device"] == results["host"]
    assert len(seen["host"]) == len(seen["device"]) > 0
    assert all(np.array_equal(one, other) for one, other in zip(seen["host"], seen["device"]))
