"""Training sets and mixtures."""

import data_trees as trees
import pytest
from data_trees import MINI, words

import data_scripts
from data_scripts.mixture import FAMILIES, Mixture, TrainingDataset, load_mixture
from data_scripts.skipped import SkipList
from data_scripts.transforms import ReferringTransform, SemanticTransform


@pytest.fixture
def rows():
    return data_scripts.load("grefcoco", MINI)


def test_epochs_differ_and_runs_do_not(rows):
    first, again = (
        TrainingDataset(rows, ReferringTransform(), seed=3),
        TrainingDataset(rows, ReferringTransform(), seed=3),
    )
    epochs = [[words(first[epoch * len(first) + i]) for i in range(len(first))] for epoch in range(2)]
    assert epochs[0] != epochs[1]
    backwards = [words(again[i]) for i in reversed(range(2 * len(first)))]
    assert backwards[::-1] == epochs[0] + epochs[1]  # whatever the order: workers, ranks, a resumed run
    other_seed = TrainingDataset(rows, ReferringTransform(), seed=4)
    assert [words(other_seed[i]) for i in range(len(rows))] != epochs[0]


def test_workers_give_the_same_stream(rows):
    torch_data = pytest.importorskip("torch.utils.data")
    dataset = TrainingDataset(rows, ReferringTransform(), seed=3)
    indices = list(range(5, 15))
    streams = [
        [words(example) for example in torch_data.DataLoader(dataset, None, sampler=indices, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert len(streams[0]) == 10 and str(streams[0]) == str(streams[1])


def test_the_mixture_keeps_its_rates_and_its_stream():
    names = {"sem_seg": ["ade20k", "pascal_part"], "refer_seg": ["grefcoco"], "vqa": ["llava_instruct_150k"]}
    mixed = load_mixture(MINI, names, rates={"vqa": 6}, length=60, seed=5)
    assert len(mixed) == 60 and mixed.rates == [9, 3, 6]
    kinds = ["vqa" if not len(one["masks"][0]) else "seg" for one in (mixed[i] for i in range(120))]
    assert 20 <= kinds.count("vqa") <= 60  # a third of 120, more or less
    again = load_mixture(MINI, names, rates={"vqa": 6}, length=60, seed=5)
    assert words(again[77]) == words(mixed[77]) and words(mixed[17]) != words(mixed[77])


def test_the_mixture_loads_only_what_is_asked_for(root, monkeypatch):
    trees.ade20k(root, trees.full(1))
    loaded = []
    load = data_scripts.load
    monkeypatch.setattr(data_scripts, "load", lambda name, *args: loaded.append(name) or load(name, *args))
    assert len(load_mixture(root, {"sem_seg": ["ade20k"]}, length=3)[1]["masks"]) == 1
    assert loaded == ["ade20k"]


@pytest.mark.parametrize("index", [-1])
def test_items_are_numbered_from_0(rows, index):
    with pytest.raises(IndexError, match="from 0, got -1"):
        TrainingDataset(rows, ReferringTransform())[index]


def test_options_of_a_training_set(rows):
    with pytest.raises(ValueError, match="'raise' or 'skip', got 'ignore'"):
        TrainingDataset(rows, ReferringTransform(), on_bad_image="ignore")
    with pytest.raises(ValueError, match="no rows"):
        TrainingDataset([], ReferringTransform())
    with pytest.raises(ValueError, match="a rate above 0"):
        Mixture({"refer_seg": (0, [TrainingDataset(rows, ReferringTransform())])}, 5)


def test_the_default_mixture_names_only_sets_that_exist():
    assert {name for _, _, names in FAMILIES.values() for name in names} <= set(data_scripts.names())


def test_two_sets_without_a_mixture_are_two_datasets(root):
    """The original's no_sampling mode silently takes the first of two; here one dataset is one set of rows."""
    trees.ade20k(root, trees.full(1), trees.full(2))
    rows = data_scripts.load("ade20k", root)
    assert len(TrainingDataset(rows, SemanticTransform())) == 2
    mixed = Mixture({"sem_seg": (1, [TrainingDataset(rows, SemanticTransform())] * 2)}, length=5)
    assert len(mixed) == 5


@pytest.mark.parametrize("families", [{"vqa": (1, [])}, {}])
def test_a_mixture_of_nothing_is_refused(families):
    with pytest.raises(ValueError, match="at least one"):
        Mixture(families, length=5)


def test_an_unknown_family_is_refused(root):
    with pytest.raises(ValueError, match="sem_seg, refer_seg, vqa, reason_seg"):
        load_mixture(root, {"semantic": ["ade20k"]})


def test_skipped_images_are_listed_once_however_often_they_are_met(root, tmp_path):
    trees.ade20k(root, trees.full(1), trees.full(2))
    rows = data_scripts.load("ade20k", root)
    (root / "ade20k/images/training/0.jpg").write_bytes(b"no image")
    skipped = SkipList(tmp_path / "out/skipped.txt")
    dataset = TrainingDataset(rows, SemanticTransform(), on_bad_image="skip", skip_list=skipped)
    assert {dataset[i]["image_id"] for i in range(6)} == {"1"} and dataset.skipped >= 3
    (line,) = skipped.read()
    assert "training/0.jpg cannot be read" in line
    assert skipped.summary().startswith("\nskipped 1 images:\n  The image ")
    assert SkipList(tmp_path / "none").summary() == ""
