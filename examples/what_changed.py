"""Two studies of one patient in one prompt, by the pipeline of Transformers: what changed?

python examples/what_changed.py MODEL BEFORE TODAY
"""

from __future__ import annotations

import sys

from transformers import pipeline


def ask_what_changed(model: str, before: str, today: str) -> str:
    """The model's words on two scans, files or DICOM folders, in the order of time."""
    answer = pipeline("image-text-to-text", model=model, trust_remote_code=True)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "This is the scan of last year: "},
                {"type": "image", "path": before},
                {"type": "text", "text": " and this the one of today: "},
                {"type": "image", "path": today},
                {"type": "text", "text": " What changed?"},
            ],
        }
    ]
    return answer(text=messages, max_new_tokens=200, return_full_text=False)[0]["generated_text"]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    print("Research use only. Not a diagnosis.")
    print(ask_what_changed(*sys.argv[1:]))
