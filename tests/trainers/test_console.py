"""What a run says: a row per log, no dictionaries, no bars that count files."""

from types import SimpleNamespace

import pytest
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from trainers.console import RunTable, quieten, show_as_table


class Callbacks:
    """A trainer as far as its callbacks go."""

    def __init__(self, **arguments):
        self.args = SimpleNamespace(**{"disable_tqdm": False, "log_level": "passive", **arguments})
        self.kinds = [ProgressCallback, PrinterCallback]

    def remove_callback(self, kind):
        self.kinds.remove(kind)

    def add_callback(self, callback):
        self.kinds.append(type(callback))


def test_a_row_per_log_and_the_heading_once():
    table = RunTable()
    first = table.lines({"loss": 2.5, "slot_accuracy": 0.5, "epoch": 0.1, "data_wait_share": 0.2}, 1)
    assert first == ["  step    loss   slots", "     1  2.5000  0.5000"]
    assert table.lines({"loss": 2.0, "mask_iou": 0.5}, 2) == ["     2  2.0000       -"]  # without slots
    assert table.lines({"eval_gIoU": 0.5, "eval_runtime": 3.0}, 2) == ["     2  evaluated: gIoU 0.5000"]
    assert table.lines({"train_runtime": 3.0, "train_loss": 1.0}, 2) == []


def test_only_the_first_process_prints(capsys):
    for is_first in (False, True):
        state = SimpleNamespace(is_world_process_zero=is_first, global_step=7)
        RunTable().on_log(None, state, None, logs={"loss": 1.0})
        assert ("7" in capsys.readouterr().out) == is_first


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_dictionaries_give_way_to_the_table(disable_tqdm):
    trainer = Callbacks(disable_tqdm=disable_tqdm)
    show_as_table(trainer)
    assert ProgressCallback not in trainer.kinds and PrinterCallback not in trainer.kinds
    assert len(trainer.kinds) == 2 - disable_tqdm and RunTable in trainer.kinds


def test_debug_brings_everything_back():
    import logging

    trainer = Callbacks(log_level="debug")
    show_as_table(trainer)
    assert trainer.kinds == [ProgressCallback, PrinterCallback]
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.WARNING)
    quieten("debug")
    assert logger.level == logging.WARNING
    quieten("passive")
    assert logger.level == logging.ERROR
    logger.setLevel(before)


def test_checkpoints_are_saved_without_bars():
    table, shown = RunTable(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    table.on_train_begin(None, None, None)
    assert not transformers_logging.is_progress_bar_enabled()
    table.on_train_end(None, None, None)
    assert transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
