"""Pipelines whose images other processes prepare, under every start method: the workers hold the processor, never the model."""

import multiprocessing
import pickle

import pytest
import torch
from PIL import Image

from modeling_gsva import GsvaPipeline

COLORS = ["red", "lime", "blue"]


class Rows(torch.utils.data.Dataset):
    """A data set that a worker can import."""

    def __len__(self):
        return len(COLORS)

    def __getitem__(self, number):
        return {"image": Image.new("RGB", (40, 30), COLORS[number]), "expressions": ["a", "b"]}


class Stream:
    """Rows without a length."""

    def __iter__(self):
        return iter(Rows()[number] for number in range(len(COLORS)))


@pytest.fixture
def pipe(make_model, processor):
    """A model that cannot be pickled, as any that has returned its hidden states once."""
    model = make_model()
    model.not_to_be_pickled = lambda: None
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(model)
    return GsvaPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(params=multiprocessing.get_all_start_methods())
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def numbers(results):
    return [[(entry["text"], entry["score"], entry["mask"].sum()) for entry in image] for image in results]


def test_workers_prepare_what_the_process_itself_does(pipe, start_method):
    expected = numbers(pipe(Rows()))
    assert len(expected) == len(COLORS) and len({str(image) for image in expected}) == len(COLORS)
    assert numbers(pipe(Stream(), num_workers=1)) == expected
    expected = numbers(pipe(Rows(), batch_size=2))
    assert numbers(pipe(Rows(), num_workers=2, batch_size=2)) == expected  # in the same order


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_generator_is_read_where_it_is(pipe, batch_size):
    expected = numbers(pipe(Rows(), batch_size=batch_size))
    assert numbers(pipe(iter(Stream()), num_workers=2, batch_size=batch_size)) == expected


def test_the_workers_get_no_model(pipe, monkeypatch):
    seen = []

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(len(pickle.dumps((self.dataset, self.collate_fn))))

    monkeypatch.setattr("modeling_gsva.pipeline_gsva.DataLoader", Loader)
    weights = sum(value.numel() * value.element_size() for value in pipe.model.parameters())
    for size in (1, 2):
        list(pipe(Rows(), batch_size=size))
    assert len(seen) == 2 and max(seen) < weights
