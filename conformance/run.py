"""Runs Transformers' own conformance suites on this package's public classes.

    python conformance/run.py [pytest options]

Fetches the suites of the installed Transformers into `.conformance/` first (see prepare.py), then tells how many tests
apply, pass and are skipped, and why.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

from prepare import prepare

HERE = Path(__file__).parent
# needs what this package has no part in, or hardware that is not there; these tests do not apply
NOT_APPLICABLE = re.compile(
    r"requires|is slow|video|audio|feature_extractor|Torchcodec|librosa|sparse experts|router_logits|grouped_mm|"
    r"position embeddings|base_model_class|prioritized|TP plan|No conversion found|does not support sliding|"
    r"_get_num_multimodal_tokens|tools|Encoder-decoder|encoder-decoder|not have a generation|No decoder-only|"
    r"keep_in_fp32|MoE|moe|Mamba|composite|annotation|post_process|No usage of the|only one backend|Skipping",
)


def main() -> int:
    root = prepare(HERE.parent / ".conformance")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), str(HERE), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rsfE",
        "--disable-warnings",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        str(HERE),
    ]
    files = [str(HERE / "test_models.py"), str(HERE / "test_processors.py")]
    done = subprocess.run([*command, *files, *sys.argv[1:]], env=environment, text=True, capture_output=True)
    print(done.stdout[-6000:] if done.returncode else "", end="")
    skipped: collections.Counter[str] = collections.Counter()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] [^ ]+ (.*)$", done.stdout, re.MULTILINE):
        skipped[reason] += int(count)
    closing = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-2000:]
    passed = int((re.findall(r"(\d+) passed", closing) or ["0"])[0])
    applying = {reason: count for reason, count in skipped.items() if not NOT_APPLICABLE.search(reason)}
    print("Skipped, and not because the hardware or the modality is missing:")
    for reason, count in sorted(applying.items(), key=lambda item: -item[1]):
        print(f"  {count:3d}  {reason}")
    share = sum(applying.values()) / max(passed + sum(applying.values()), 1)
    print(f"{passed} tests pass; {sum(applying.values())} that apply are skipped ({share:.1%}).")
    print(closing)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
