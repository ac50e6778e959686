"""Transformers' image-processor and processor suites on ours. Run by `make conformance`."""

from __future__ import annotations

import unittest

import numpy as np
import torch
from tests.test_image_processing_common import ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin

from ctinstruct_hf import CTInstructImageProcessor, CTInstructProcessor
from ctinstruct_hf.data.vocabulary import train_tokenizer

PATCH = {"depth": 4, "height": 32, "width": 32}


class ImageTester:
    """Volumes of several sizes and settings that differ from the defaults."""

    batch_size = 3
    num_channels = 1

    def prepare_image_processor_dict(self) -> dict[str, object]:
        return {"patch_size": PATCH, "max_patches": 2, "hu_window": [-500.0, 500.0]}

    def prepare_image_inputs(self, equal_resolution: bool = False, numpify: bool = False, torchify: bool = False) -> list:
        rng = np.random.default_rng(0)
        sizes = [(4, 32, 32)] * 3 if equal_resolution else [(4, 32, 32), (6, 40, 30), (1, 20, 50)]
        volumes = [rng.integers(-1000, 1000, size).astype(np.float32) for size in sizes]
        return [torch.from_numpy(volume) for volume in volumes] if torchify else volumes


class CTInstructImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_class = CTInstructImageProcessor
    image_processing_classes = {"pil": CTInstructImageProcessor}

    def setUp(self) -> None:
        super().setUp()
        self.image_processor_tester = ImageTester()
        self.image_processing_classes = {"pil": CTInstructImageProcessor}

    @property
    def image_processor_dict(self) -> dict[str, object]:
        return self.image_processor_tester.prepare_image_processor_dict()


class CTInstructProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CTInstructProcessor
    images_input_name = "pixel_values"

    @classmethod
    def _setup_image_processor(cls) -> CTInstructImageProcessor:
        return CTInstructImageProcessor(patch_size=PATCH, max_patches=2)

    @classmethod
    def _setup_tokenizer(cls) -> object:
        return train_tokenizer()

    @staticmethod
    def prepare_processor_dict() -> dict[str, object]:
        return {"disease_lists": {"two": ["cardiomegaly", "emphysema"]}}


if __name__ == "__main__":
    unittest.main()
