"""Corrections over HTTP: kept in the study, and taken away as a report or as rows to train on."""

from __future__ import annotations

import asyncio
import io
import json
import zipfile
import zlib
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from ..data.cases import ImageRef, Label, MaskRef
from ..data.samples import InstructionSample, write_jsonl
from ..data.templates import REPORT, answer_diagnosis, answer_segmentation, ask_diagnosis, ask_segmentation
from ..errors import CTInstructError
from ..output.types import NOTICE
from .engine import Engine
from .open_studies import OpenStudy
from .receiving import parts, read_json, refuse_unknown
from .review import as_docx, as_markdown, as_text

_TYPES = {
    "report.txt": "text/plain; charset=utf-8",
    "report.md": "text/markdown; charset=utf-8",
    "report.docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "report.json": "application/json",
    "corrections.zip": "application/zip",
}


def add_review(app: FastAPI, engine: Engine) -> None:
    writing = asyncio.Semaphore(1)

    @app.put("/api/studies/{study}/review")
    async def correct(study: str, request: Request) -> dict[str, Any]:
        """Correct the report, {"sentences": [{"text", "state": open, accepted, changed or struck}]}, one for each of the
        results' `sentences`, or findings, {"labels": {finding: true, false or null}}."""
        words = await read_json(request, engine.limits.idle_upload)
        refuse_unknown(words, ["sentences", "labels"])
        one = engine.find(study)
        if "sentences" in words:
            one.review.correct(one.study.results.report, words["sentences"])
        if "labels" in words:
            one.review.mark(words["labels"], list(one.study.model.config.disease_names))
        return {"sentences": one.review.sentences_of(one.study.results.report), "labels": one.review.labels}

    @app.put("/api/studies/{study}/masks/{name}/edited", status_code=201)
    async def edit(study: str, name: str, request: Request) -> dict[str, Any]:
        """A corrected mask of a structure, kept beside the model's as "NAME (edited)": a byte for each voxel of scan.nii in
        its order, 0 outside, as the body, compressed by zlib."""
        one = engine.find(study)
        body = bytearray()
        async for part in parts(request, engine.limits.idle_upload):
            body += part
            if len(body) > engine.limits.mask_bytes:
                raise CTInstructError("The mask is too large.")
        return await run_in_threadpool(_keep_edited, one, name, bytes(body))

    @app.get("/api/studies/{study}/review/{file}", response_class=Response)
    async def review(study: str, file: str) -> Response:
        """The corrected report (report.txt, .md, .docx, or .json with the original beside it), or corrections.zip: the
        scan, corrected masks, and rows that `ctinstruct data import` takes."""
        media = _TYPES[file]
        one = engine.find(study)
        async with writing:
            content = await run_in_threadpool(_write, one, file)
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{quote(file)}"}
        return Response(content, media_type=media, headers=headers)


def _keep_edited(one: OpenStudy, name: str, body: bytes) -> dict[str, Any]:
    volume = one.study.volume
    structure = one.review.edited.get(name, name)
    kept = f"{structure} (edited)"
    with one.use():
        if name not in one.masks:
            raise KeyError(name)
        voxels = int(np.prod(volume.source.shape))
        unpacking = zlib.decompressobj()
        try:
            stored = unpacking.decompress(body, voxels + 1)
        except zlib.error as error:
            raise CTInstructError("The mask is not compressed by zlib.") from error
        if len(stored) != voxels:
            raise CTInstructError(f"The mask must have {voxels} bytes, one for each voxel of the scan.")
        grid = (np.frombuffer(stored, np.uint8) > 0).reshape(volume.source.shape, order="F")
        if volume.source.resampling is not None:
            grid = volume.source.resampling.forward(grid.astype(np.uint8), 0, nearest=True) > 0
        mask = np.ascontiguousarray(volume.from_file_axes(grid))
        one.review.edited[kept] = structure
        one.study.results.masks[kept] = mask
        one.keep_mask(kept, mask)
        one.label_map.update(one.study.results.masks)
    return {"name": kept, **one.masks[kept]}


def _write(one: OpenStudy, file: str) -> bytes:
    report = one.study.results.report
    if file == "corrections.zip":
        return _corrections(one)
    if report is None:
        raise CTInstructError("There is no report yet: write one first.")
    sentences = one.review.sentences_of(report)
    if file == "report.docx":
        return as_docx(sentences, NOTICE)
    if file == "report.json":
        content = {
            "research_use_only": True,
            "original": report,
            "corrected": as_text(sentences),
            "sentences": sentences,
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    text = as_text(sentences) if file == "report.txt" else as_markdown(sentences)
    return f"{NOTICE}\n\n{text}\n".encode()


def _corrections(one: OpenStudy) -> bytes:
    """A zip of the scan, the corrected masks and corrections.jsonl, a row for the report, the findings and each mask."""
    config, review = one.study.model.config, one.review
    with one.use():
        images, name = [ImageRef("scan.nii")], one.folder.name
        rows: list[tuple[str, str, str, dict[str, Any]]] = []
        sentences = review.sentences_of(one.study.results.report)
        if any(sentence["state"] != "open" for sentence in sentences):
            rows.append(("report", REPORT[0], as_text(sentences), {}))
        if review.labels:
            labels = [Label(disease, int(there)) for disease, there in review.labels.items()]
            names = list(review.labels)
            rows.append(("diagnosis", ask_diagnosis(names), answer_diagnosis(names), {"labels": labels}))
        for kept, structure in review.edited.items():
            mask = MaskRef(structure, f"masks/{one.masks[kept]['file']}" if one.masks[kept]["voxels"] else "")
            answer = answer_segmentation([structure], config.names_masks)
            rows.append(("segmentation", ask_segmentation([structure]), answer, {"masks": [mask]}))
        if not rows:
            raise CTInstructError("Nothing is corrected yet: correct a sentence, a finding or a mask first.")
        samples = [
            InstructionSample(
                f"{name}-{number}",
                images,
                [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
                    {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                ],
                task,
                "train",
                "corrections",
                patient=name,
                **more,
            )
            for number, (task, question, answer, more) in enumerate(rows)
        ]
        table = one.folder / "corrections.jsonl"
        write_jsonl(samples, table)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
            packed.write(table, table.name)
            packed.write(one.folder / "scan.nii", "scan.nii")
            for kept in review.edited:
                packed.write(one.folder / "masks" / one.masks[kept]["file"], f"masks/{one.masks[kept]['file']}")
        return content.getvalue()


__all__ = ["add_review"]
