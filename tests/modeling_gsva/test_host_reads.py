"""How often the host waits for the device: counted on a CPU by the reads of tensors, and on a GPU by CUDA itself."""

import numpy as np
import pytest
import torch
from host_reads import HostReads

from modeling_gsva.transfer_gsva import mask_of_runs, mask_runs, masks_to_host, to_device

SIZES = ((2, 2), (2, 5), (4, 5))  # images, and expressions of each


def reads_of(function, *args, **kwargs):
    with HostReads() as reads:
        result = function(*args, **kwargs)
    return result, reads


@pytest.mark.parametrize("single", [False, True], ids=["one prompt", "a prompt each"])
@pytest.mark.parametrize("method", ["slots", "teacher_forced", "generate"])
def test_segment_reads_a_constant_number_of_times(model, processor, asked, method, single, monkeypatch):
    """However many images, conversations and slots a batch has; and its masks come back in one copy."""
    monkeypatch.setattr("modeling_gsva.results_gsva.masks_to_host", lambda masks: [m.numpy() for m in masks])
    options = {"max_new_tokens": 4} if method == "generate" else {}
    counts = []
    for size in SIZES:
        inputs = asked(*size, single)
        outputs, reads = reads_of(model.segment, **inputs, method=method, **options)
        results, after = reads_of(processor.post_process_segmentation, outputs, inputs, as_tensors=True)
        assert [len(of_image) for of_image in results] == [size[1]] * size[0]
        counts.append((reads.count, after.count))
        assert reads.count <= 16 and after.count <= 9, (reads.places, after.places)
    assert counts[1] == counts[2]  # fewer slots may leave a step out, more never add one


def test_training_reads_no_slot_and_no_image(make_model, learned):
    model = make_model().train()
    counts = []
    for size in SIZES:
        batch = learned(*size)
        outputs, reads = reads_of(model, **batch)
        assert len(outputs.mask_ious) == size[0] * (size[1] // 2)
        _, backward = reads_of(outputs.loss.backward)
        assert backward.count == 0
        counts.append(reads.count)
    assert counts[0] == counts[1] == counts[2] <= 10


def test_reads_are_counted():
    """The counter sees what it claims to see, in files of the rooms that it watches."""
    values, count = torch.arange(4.0), {}
    reads_by_name = {
        "none": lambda: values.sum(), "tolist": lambda: values.tolist(), "bool": lambda: bool(values[1] > 0),
        "int": lambda: int(values[1]), "item": lambda: values[1].item(), "nonzero": lambda: values.nonzero(),
        "mask": lambda: values[values > 1], "cpu": lambda: values.cpu(), "where": lambda: torch.where(values > 1),
        "assigned": lambda: values.__setitem__(values > 5, 1), "equal": lambda: torch.equal(values, values),
    }  # fmt: skip
    for name, read in reads_by_name.items():
        with HostReads(inside=("tests",)) as reads:
            read()
        count[name] = reads.count
    assert count == {name: int(name != "none") for name in reads_by_name}


@pytest.mark.parametrize("seed", range(3))
def test_runs_are_those_of_the_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    masks = [
        torch.rand(n, height, width, generator=generator) > share
        for n, height, width, share in (
            (3, 7, 5, 0.5),
            (0, 4, 4, 0.5),
            (2, 1, 1, 0.5),
            (2, 6, 9, 2.0),
            (2, 6, 9, -1.0),
        )
    ]
    runs = mask_runs(masks)
    assert [len(of) for of in runs] == [3, 0, 2, 2, 2]
    for tensor, of in zip(masks, runs):
        for mask, lengths in zip(tensor, of):
            assert lengths.sum() == mask.numel() and (lengths[1:] > 0).all()
            assert np.array_equal(mask_of_runs(lengths, *mask.shape), mask.numpy())
    for tensor, array in zip(masks, masks_to_host(masks)):
        assert np.array_equal(tensor.numpy(), array)
    assert [len(of) for of in mask_runs([torch.zeros(2, 0, 3, dtype=torch.bool), masks[1]])] == [2, 0]


def test_masks_of_tensors_are_those_of_arrays(model, processor, asked):
    inputs = asked(2, 3)
    outputs = model.segment(**inputs, method="teacher_forced")
    options = {"keep_rejected_masks": True}
    arrays = processor.post_process_segmentation(outputs, inputs, **options)
    tensors = processor.post_process_segmentation(outputs, inputs, as_tensors=True, **options)
    assert any(result["mask"].any() for of_image in arrays for result in of_image)
    for of_image, same in zip(arrays, tensors):
        for result, tensor in zip(of_image, same):
            assert torch.is_tensor(tensor["mask"]) and np.array_equal(result.pop("mask"), tensor.pop("mask").numpy())
            assert result == tensor


def test_lists_go_to_the_device():
    assert to_device([[1, 2], [3, 4]], "cpu").tolist() == [[1, 2], [3, 4]]
    assert to_device([], torch.device("cpu")).dtype == torch.long


@pytest.mark.gpu
def test_cuda_counts_no_more_than_we_do(make_model, processor, asked, learned):
    """`set_sync_debug_mode` warns of each wait; what transformers waits for is in the number."""
    import warnings

    def waits(function, *args, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return result, sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    model = make_model().cuda()
    counts = []
    for size in SIZES:
        inputs = asked(*size).to("cuda")
        model.segment(**inputs)
        outputs, during = waits(model.segment, **inputs)
        counts.append((during, waits(processor.post_process_segmentation, outputs, inputs)[1]))
    assert counts[1] == counts[2], counts
    model.train()
    steps = []
    for size in SIZES:
        batch = learned(*size)
        batch = batch.to("cuda")
        model(**batch)
        steps.append(waits(model, **batch)[1])
    assert steps[1] == steps[2], steps
