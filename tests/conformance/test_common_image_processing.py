"""ImageProcessingTestMixin of transformers on GsvaImageProcessor."""

import unittest

import hf_common

from modeling_gsva import GsvaImageProcessor

common = hf_common.load("test_image_processing_common")


class GsvaImageProcessingTester(common.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        kwargs.setdefault("sam_size", {"longest_edge": 64})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        """By folder and name transformers finds its own; this one uses Pillow alone."""
        return {"pil": GsvaImageProcessor}


class GsvaImageProcessingTest(common.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = GsvaImageProcessingTester
    test_cast_dtype = True

    def test_new_models_require_torchvision_backend(self):
        """Pillow alone is the requirement: torchvision is no dependency, and resizes otherwise than the original's code."""
        self.assertEqual(set(self.image_processing_classes), {"pil"})
