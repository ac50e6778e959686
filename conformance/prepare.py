"""Fetches the conformance suites of the installed Transformers: they are in its source distribution on PyPI.

    python conformance/prepare.py FOLDER

The distribution lacks four small modules that the suites import; stand-ins are written for them. Generation has tests of
our own (tests/modeling/test_generation.py).
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

STAND_INS = {
    "tests/__init__.py": "",
    "tests/exporters/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/__init__.py": "",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/__init__.py": "",
    "tests/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        "    'return_dict': False,\n    'output_hidden_states': True,\n    'output_attentions': True,\n"
        "    'dtype': 'float16',\n    'chunk_size_feed_forward': 5,\n    'architectures': ['BertModel'],\n"
        "    'id2label': {0: 'label'},\n    'label2id': {'label': '0'},\n    'problem_type': 'regression',\n}\n"
    ),
    # pictures from the network: a grey slice on this disk instead
    "fetch_hub_objects_for_ci.py": (
        "import os, tempfile\n"
        "from PIL import Image\n\n"
        "def url_to_local_path(url, return_url_if_not_found=True):\n"
        "    path = os.path.join(tempfile.gettempdir(), 'ctinstruct_conformance.png')\n"
        "    Image.new('L', (30, 40), 90).save(path)\n"
        "    return path\n"
    ),
}


def prepare(folder: Path) -> Path:
    """The folder to put on PYTHONPATH: `tests.test_modeling_common` and its siblings."""
    version = transformers.__version__
    root = folder / f"transformers-{version}"
    if not (root / "fetch_hub_objects_for_ci.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / f"transformers-{version}.tar.gz"
        if not archive.exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run(
                [*command, "--no-build-isolation", "-d", str(folder), f"transformers=={version}"], check=True
            )
        with tarfile.open(archive) as tar:
            tar.extractall(folder, [one for one in tar.getmembers() if "/tests/" in one.name], filter="data")
        for name, text in STAND_INS.items():
            file = root / name
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    return root


if __name__ == "__main__":
    print(prepare(Path(sys.argv[1])))
