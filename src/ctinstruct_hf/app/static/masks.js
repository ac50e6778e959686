// Masks: all structures as one label map over the scan, and their list.
"use strict";

async function mark() {
  const ticked = [...document.querySelectorAll(".ticks input:checked")].map((box) => box.value);
  const named = $("named").value.split(",").map((name) => name.trim()).filter(Boolean);
  const structures = [...new Set([...ticked, ...named])];
  if (!structures.length) throw new Error("Tick a structure or write its name first.");
  const result = await work({ kind: "segment", structures });
  if (!result) return;
  await drawMasks();
  for (const box of document.querySelectorAll(".ticks input:checked")) box.checked = false;
  $("named").value = "";
}

async function drawMasks() {
  // All masks of the study, as the server has them now.
  const base = `api/studies/${page.study.study}`;
  const { masks } = await call("GET", `${base}/results`);
  const shown = new Map([...page.masks].map(([name, mask]) => [name, mask.shown]));
  const corrected = new Set(Object.values(masks).map((mask) => mask.edited_from)); // the model's own is hidden under it
  page.masks = new Map(
    Object.entries(masks).map(([name, measured]) => {
      return [name, { name, measured, shown: shown.get(name) ?? !corrected.has(name), url: `${base}/masks/${encodeURIComponent(measured.file)}` }];
    }),
  );
  listMasks();
  const answer = await fetch(`${base}/labels.nii`);
  if (!answer.ok) throw new Error("The masks did not arrive.");
  setDrawing(labelsOf(await answer.arrayBuffer(), page.viewer.volumes[0]));
  paintMasks();
}

function setDrawing(labels) {
  // Voxels in the viewer's order. NiiVue's createEmptyDrawing fills and compresses two more volumes first.
  const viewer = page.viewer;
  viewer.drawTexture = viewer.r8Tex(viewer.drawTexture, viewer.gl.TEXTURE7, viewer.back.dims);
  viewer.drawBitmap = labels;
  viewer.refreshDrawing(false);
}

function* rows(scan) {
  // Each row of voxels: where it starts in the viewer's order, where in the file, and the step there.
  const [, width, height, depth] = scan.dimsRAS;
  const [right, front, up] = scan.img2RASstep;
  const first = scan.img2RASstart[0] + scan.img2RASstart[1] + scan.img2RASstart[2];
  for (let k = 0; k < depth; k++) {
    for (let j = 0; j < height; j++) yield [(k * height + j) * width, first + k * up + j * front, right, width];
  }
}

function labelsOf(file, scan) {
  // The voxels of an uncompressed NIfTI on the scan's grid as bytes in the viewer's order. NiiVue's own reading of a
  // drawing looks for percentiles and keeps a copy to undo, which takes longer than everything here.
  const header = new DataView(file);
  const [start, bits] = [header.getFloat32(108, true), header.getInt16(72, true)];
  const stored = bits === 8 ? new Uint8Array(file, start) : Uint8Array.from(new Uint16Array(file.slice(start)), slot);
  const labels = new Uint8Array(stored.length);
  for (const [here, there, step, width] of rows(scan)) {
    for (let i = 0, at = there; i < width; i++, at += step) labels[here + i] = stored[at];
  }
  return labels;
}

function fileOrder(labels, scan) {
  // The inverse of `labelsOf`: a byte for each voxel, in the order of the scan's file.
  const stored = new Uint8Array(labels.length);
  for (const [here, there, step, width] of rows(scan)) {
    for (let i = 0, at = there; i < width; i++, at += step) stored[at] = labels[here + i];
  }
  return stored;
}

const slot = (number) => (number ? ((number - 1) % 255) + 1 : 0);

function paintMasks() {
  // Colours, opacity and outlines, without touching the voxels.
  const viewer = page.viewer;
  if (!viewer) return;
  const lut = new Uint8ClampedArray(256 * 4);
  for (const { measured, shown } of page.masks.values()) {
    const rgb = [1, 3, 5].map((start) => parseInt(measured.colour.slice(start, start + 2), 16));
    lut.set([...rgb, shown ? 255 : 0], 4 * slot(measured.number));
  }
  viewer.drawLut = { lut, labels: Array.from({ length: 256 }, () => "") };
  const opacity = Number($("opacity").value);
  const outlines = $("outlines").checked;
  viewer.drawRimOpacity = outlines ? opacity : -1;
  viewer.drawOpacity = outlines ? Math.min(opacity, 0.01) : opacity; // at 0 the rim would not be drawn either
  viewer.refreshColormaps();
  viewer.drawScene();
}

function listMasks() {
  const items = [...page.masks].map(([name, mask]) => {
    const { measured } = mask;
    const row = make("li", undefined, { "data-finding": anchor("mask", name) });
    const box = make("input", undefined, { type: "checkbox", "aria-label": `show ${name}` });
    box.checked = mask.shown;
    box.addEventListener("change", () => {
      mask.shown = box.checked;
      paintMasks();
    });
    const size = measured.voxels ? `${measured.volume_ml.toFixed(1)} ml, ${Math.round(measured.mean_hu)} HU` : "nothing found";
    const go = button("Go to", () => goTo(mask), { "aria-label": `go to ${name}` });
    go.disabled = !measured.voxels;
    const words = make("span", `${name}: ${size}`, { class: "grow" });
    if (!measured.known) words.append(" ", make("strong", "unknown to the model", { class: "unknown" }));
    row.append(
      box,
      make("span", undefined, { class: "swatch", style: `background:${measured.colour}` }),
      words,
      go,
      button("Correct", () => startEdit(mask).catch(complain), { "aria-label": `correct ${name}` }),
      make("a", "NIfTI", { href: mask.url, download: measured.file, "aria-label": `download ${name} as NIfTI` }),
    );
    return row;
  });
  $("masks").replaceChildren(...items);
  $("seg-item").hidden = !(page.study.dicom && items.length);
}

function goTo(mask) {
  const lines = mask.measured.lines_mm;
  page.viewer.scene.crosshairPos = page.viewer.mm2frac(lines.length && $("diameters").checked ? middle(lines[0]) : mask.measured.place_mm);
  page.viewer.drawScene();
  showPosition();
}

function startMasks() {
  for (const [id, names] of [["structures", page.model.structures], ["findings", page.model.findings]]) {
    for (const name of names) {
      const label = make("label");
      label.append(make("input", undefined, { type: "checkbox", value: name }), ` ${name}`);
      $(id).append(label);
    }
  }
  $("mark").addEventListener("click", guarded(mark));
  $("opacity").addEventListener("input", paintMasks);
  $("outlines").addEventListener("change", paintMasks);
  $("filter").addEventListener("input", () => {
    const wanted = $("filter").value.trim().toLowerCase();
    for (const label of document.querySelectorAll(".ticks label")) label.hidden = !label.textContent.toLowerCase().includes(wanted);
  });
  $("all-organs").addEventListener("click", () => {
    for (const box of $("structures").querySelectorAll("input")) box.checked = true;
  });
}
