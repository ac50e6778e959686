"""Transformers' model and configuration suites on every public model class. Run by `make conformance`."""

from __future__ import annotations

import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask
from tiny import VOCABULARY, tiny_config
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ctinstruct_hf import (
    CTInstructConfig,
    CTInstructForConditionalGeneration,
    CTInstructForPretraining,
    CTInstructModel,
    CTInstructSegmentationConfig,
    CTInstructVisionConfig,
    CTInstructVisionModel,
)

# what the library's own models have in these tables; the suite reads there which heads have no loss
MODEL_MAPPING_NAMES.update(
    {
        "ctinstruct": "CTInstructModel",
        "ctinstruct_vision": "CTInstructVisionModel",
        "ctinstruct_segmentation": "CTInstructSegmentationDecoder",
    }
)


class Tester:
    """Sizes that the suite asks for. Every image is one slice, so that all inputs have the batch as first axis."""

    batch_size = 2
    seq_length = 9
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    is_training = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> CTInstructConfig:
        return tiny_config()

    def pixels(self) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": floats_tensor([self.batch_size, 64, 64]),
            "patch_grid": torch.tensor([[1, 1, 1, 1]] * self.batch_size),
        }

    def prepare_config_and_inputs_for_common(self) -> tuple[object, dict[str, torch.Tensor]]:
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], VOCABULARY - 10) + 8
        input_ids[:, 1] = config.image_token_id
        attention_mask = random_attention_mask([self.batch_size, self.seq_length])
        attention_mask[:, :3] = 1
        return config, {"input_ids": input_ids, "attention_mask": attention_mask, **self.pixels()}


class WithAnswers:
    """Training inputs that use every part, so that every parameter gets a gradient."""

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if not return_labels:
            return inputs
        batch = len(inputs["patch_grid"])
        masks = [torch.zeros(1, 64, 64, dtype=torch.int8) for _ in range(batch)]
        if model_class is CTInstructForConditionalGeneration:
            config = self.model_tester.get_config()
            inputs["input_ids"][:, 3] = config.seg_token_id
            inputs["input_ids"][:, 4] = config.disease_token_id
            inputs["attention_mask"][:] = 1
            inputs["labels"] = inputs["input_ids"].clone()
            inputs["mask_labels"] = masks
            inputs["disease_ids"] = torch.arange(batch)
            inputs["disease_labels"] = torch.ones(batch)
        elif model_class is CTInstructForPretraining:
            names = torch.arange(8, 8 + 4 * batch).view(batch, 4)
            inputs["mask_input_ids"], inputs["mask_labels"] = names, masks
            inputs["mask_images"] = torch.arange(batch)
            inputs["class_input_ids"], inputs["class_labels"] = names, torch.ones(batch, batch)
        return inputs


class TowerAttentions:
    """The tower's attentions are [groups, heads, cells, cells]: over patches, then over slices."""

    def test_attention_outputs(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            model.set_attn_implementation("eager")
            with torch.no_grad():
                attentions = model(**inputs, output_attentions=True).attentions
            assert [tuple(weights.shape) for weights in attentions] == [(2, 2, 4, 4), (8, 2, 1, 1)]
            for weights in attentions:
                torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


class CTInstructModelsTest(WithAnswers, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTInstructModel, CTInstructForConditionalGeneration)
    _is_composite = True
    test_torch_exportable = False
    # generation has a suite of its own, which the distribution of Transformers lacks: tests/modeling/test_generation.py
    all_generative_model_classes = ()

    def setUp(self) -> None:
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=CTInstructConfig, has_text_modality=False)

    def _image_features_prepare_config_and_inputs(self) -> tuple[object, dict[str, torch.Tensor]]:
        """The suite finds images' inputs by name and would leave out `patch_grid`, which says that these are two."""
        return self.model_tester.get_config(), self.model_tester.pixels()

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class VisionTester(Tester):
    seq_length = 4  # cells of the last map

    def get_config(self) -> object:
        return tiny_config().vision_config

    def prepare_config_and_inputs_for_common(self) -> tuple[object, dict[str, torch.Tensor]]:
        return self.get_config(), self.pixels()


class CTInstructVisionModelTest(TowerAttentions, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTInstructVisionModel,)
    test_resize_embeddings = False
    test_torch_exportable = False

    def setUp(self) -> None:
        self.model_tester = VisionTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=CTInstructVisionConfig,
            has_text_modality=False,
            common_properties=["num_attention_heads"],
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self) -> None:
        """As in the library's own vision suites: the layer that reads pixels is no `nn.Embedding`."""
        model = CTInstructVisionModel(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Module)
        assert model.get_output_embeddings() is None

    def test_segmentation_config(self) -> None:
        ConfigTester(
            self, config_class=CTInstructSegmentationConfig, has_text_modality=False, common_properties=["hidden_size"]
        ).run_common_tests()


class PretrainingTester(Tester):
    seq_length = 4  # cells of the last map

    def prepare_config_and_inputs_for_common(self) -> tuple[object, dict[str, torch.Tensor]]:
        config = self.get_config()
        return config, {"input_ids": ids_tensor([self.batch_size, 7], VOCABULARY - 10) + 8, **self.pixels()}


class CTInstructForPretrainingTest(TowerAttentions, WithAnswers, ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CTInstructForPretraining,)
    _is_composite = True
    test_resize_embeddings = False
    test_torch_exportable = False

    def setUp(self) -> None:
        self.model_tester = PretrainingTester(self)


if __name__ == "__main__":
    unittest.main()
