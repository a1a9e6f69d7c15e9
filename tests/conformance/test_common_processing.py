"""ProcessorTesterMixin of transformers on GsvaProcessor."""

import unittest

import hf_common
import pytest

from modeling_gsva import GsvaImageProcessor, GsvaProcessor
from modeling_gsva.processing_gsva import CHAT_TEMPLATES

common = hf_common.load("test_processing_common")


@pytest.fixture(scope="module", autouse=True)
def tokenizer_of_the_tests(make_tokenizer):
    """The class makes its processor before any fixture of a class or test."""
    GsvaProcessorTest.make_tokenizer = staticmethod(make_tokenizer)


class GsvaProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = GsvaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return cls.make_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return GsvaImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, sam_size={"longest_edge": 64}
        )

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 8, "chat_template": CHAT_TEMPLATES["plain"]}
