"""What tests share: tiny models, small scans, the shared data where it is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from processes import WarmCommand

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, a thread each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "conformance"), str(ROOT / "tests" / "helpers")]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A function that makes the smallest config with every part."""
    from tiny import tiny_config

    return tiny_config


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny preset with random weights, as a folder."""
    from ctinstruct_hf.phantoms.tiny import build_tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with dropout and a tokenizer, as a folder."""
    from transformers import BertConfig, BertModel

    from ctinstruct_hf.phantoms.vocabulary import train_tokenizer

    folder = tmp_path_factory.mktemp("text_encoder")
    tokenizer = train_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stage-one model with random weights, as `ctinstruct pretrain` leaves it."""
    from trainings import SMALL

    from ctinstruct_hf import CTInstructConfig, CTInstructForPretraining, CTInstructImageProcessor
    from ctinstruct_hf.phantoms.vocabulary import train_tokenizer
    from ctinstruct_hf.train.checkpoints import save_trained

    config = CTInstructConfig.preset("tiny")
    config.vision_config.stage_depths = [1, 1, 1, 1]
    config.text_encoder_config.vocab_size = 3000
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stage_one") / "model"
    save_trained(folder, CTInstructForPretraining(config), train_tokenizer(), CTInstructImageProcessor(**SMALL))
    return folder


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCommand]:
    """`ctinstruct` as a process of its own at each call, without the time of imports."""
    from processes import WarmCommand

    command = WarmCommand(tmp_path_factory.mktemp("warm"))
    yield command
    command.close()


@pytest.fixture
def small_scan(tmp_path: Path) -> Path:
    """A small phantom as NIfTI."""
    from ctinstruct_hf.phantoms import make_phantom

    path = tmp_path / "scan.nii.gz"
    volume = make_phantom(1, shape=(24, 48, 48)).volume
    nib.save(volume.to_source(volume.hu), path)
    return path
