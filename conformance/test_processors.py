"""Transformers' image-processor and processor suites on ours. Run by `make conformance`."""

from __future__ import annotations

import unittest

import numpy as np
import torch
from PIL import Image
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin

from ctinstruct_hf import CTInstructImageProcessor, CTInstructProcessor
from ctinstruct_hf.phantoms.vocabulary import train_tokenizer

PATCH = {"depth": 4, "height": 32, "width": 32}


class ImageTester(ImageProcessingTester):
    """Grey slices and volumes instead of the suite's colour pictures, and settings that differ from the defaults."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.batch_size = 3
        self.num_channels = 1
        self.image_processing_classes = {"pil": CTInstructImageProcessor}

    def prepare_image_processor_dict(self) -> dict[str, object]:
        return {"patch_size": PATCH, "max_patches": 1, "hu_window": [-500.0, 500.0]}

    def prepare_image_inputs(self, numpify: bool = False, torchify: bool = False, **kwargs: object) -> list:
        rng = np.random.default_rng(0)
        slices = [rng.integers(0, 255, size).astype(np.uint8) for size in ((32, 32), (40, 30), (20, 50))]
        if not numpify and not torchify:
            return [Image.fromarray(one) for one in slices]
        volumes = [one[None].astype(np.float32) for one in slices]
        return [torch.from_numpy(one) for one in volumes] if torchify else volumes

    def expected_output_image_shape(self, images: list) -> tuple[int, ...]:
        return PATCH["height"], PATCH["width"]


class CTInstructImageProcessorTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester

    @unittest.skip("torchvision is not needed and may be absent; volumes are read by readers of their own")
    def test_new_models_require_torchvision_backend(self) -> None: ...

    @unittest.skip("CT has one channel; colour is refused (tests/processing/test_volume.py)")
    def test_call_numpy_4_channels(self) -> None: ...


class CTInstructProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = CTInstructProcessor
    images_input_name = "pixel_values"

    @classmethod
    def _setup_image_processor(cls) -> CTInstructImageProcessor:
        return CTInstructImageProcessor(patch_size=PATCH, max_patches=1)

    @classmethod
    def _setup_tokenizer(cls) -> object:
        return train_tokenizer()

    def prepare_images_inputs(self, batch_size: int | None = None, nested: bool = False) -> object:
        """Grey slices instead of the suite's colour pictures."""
        slices = [Image.fromarray(np.full((40, 30), 80 + index, np.uint8)) for index in range(batch_size or 1)]
        return slices[0] if batch_size is None else [[one] for one in slices] if nested else slices

    @staticmethod
    def prepare_processor_dict() -> dict[str, object]:
        return {"disease_lists": {"two": ["cardiomegaly", "emphysema"]}}


if __name__ == "__main__":
    unittest.main()
