"""Between host and device: lists that go there without waiting, and masks that come back as their runs."""

from collections.abc import Sequence

import numpy as np
import torch


def to_device(values: Sequence, device: torch.device | str, dtype: torch.dtype = torch.long) -> torch.Tensor:
    """Return a list as a tensor on a device, see `upload`."""
    return upload(torch.tensor(values, dtype=dtype), device)


def upload(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor on a device; the host does not wait for a CUDA device to have one of the host."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def mask_runs(masks: Sequence[torch.Tensor]) -> list[list[np.ndarray]]:
    """
    Run-length encode masks on their device, and copy nothing but the runs to the host, in one copy for all of them.

    Args:
        masks: (n, height, width) booleans; sizes may differ.

    Returns:
        For each tensor and each of its masks the lengths of its runs, column by column as COCO has it, beginning with False (a
        length of 0 where the first pixel is True).

    >>> mask_runs([torch.tensor([[[False, True], [False, True]], [[True, True], [False, True]]])])
    [[array([2, 2]), array([0, 1, 1, 2])]]
    """
    if not any(tensor.numel() for tensor in masks):
        return [[np.array([tensor[0].numel()])] * len(tensor) if len(tensor) else [] for tensor in masks]
    pieces, begins, total = [], [], 0
    for tensor in masks:
        columns = tensor.transpose(1, 2).flatten(1)  # (n, pixels)
        # A mask begins as if False were before it, and the next one does as well.
        changes = torch.cat([columns[:, :1], columns[:, 1:] != columns[:, :-1]], 1)
        pieces.append(changes.flatten())
        for _ in range(len(tensor)):
            begins.append(total)
            total += columns.shape[1]
    places = torch.cat(pieces).nonzero().flatten().cpu().numpy()
    bounds = np.searchsorted(places, [*begins, total])
    runs = []
    for begin, end, first, last in zip(begins, [*begins[1:], total], bounds, bounds[1:]):
        runs.append(np.diff(places[first:last] - begin, prepend=0, append=end - begin))
    rest = iter(runs)
    return [[next(rest) for _ in range(len(tensor))] for tensor in masks]


def mask_of_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """
    Return the boolean mask (height, width) of its runs from `mask_runs`.

    >>> mask_of_runs(np.array([2, 2]), 2, 2).tolist()
    [[False, True], [False, True]]
    """
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def masks_to_host(masks: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Return masks (n, height, width) as arrays: on a CPU the tensors' own memory, from another device by their runs."""
    if all(tensor.device.type == "cpu" for tensor in masks):
        return [tensor.numpy() for tensor in masks]
    return [
        np.stack([mask_of_runs(run, *tensor.shape[1:]) for run in runs])
        if runs
        else np.zeros(tensor.shape, dtype=bool)
        for tensor, runs in zip(masks, mask_runs(masks))
    ]


__all__ = ["mask_of_runs", "mask_runs", "masks_to_host", "to_device", "upload"]
