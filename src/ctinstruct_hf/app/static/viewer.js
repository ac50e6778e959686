// The viewer: slices by NiiVue, their position and window, and all masks as one label map over them.
"use strict";

const PLANES = ["axial", "coronal", "sagittal"]; // NiiVue's slice types 0, 1 and 2; 3 shows all of them
const ALONG = [2, 1, 0]; // the axis of voxels that leads through the slices of a plane

async function draw(url) {
  if (!page.viewer) {
    page.viewer = new niivue.Niivue({
      isRadiologicalConvention: true, // the patient's right is on the left
      sagittalNoseLeft: true, // as in report.html
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.85, 0, 0.6],
      crosshairWidth: 1,
      crosshairWidthUnit: "mm",
      show3Dcrosshair: false,
      multiplanarShowRender: niivue.SHOW_RENDER ? niivue.SHOW_RENDER.NEVER : 0,
      dragAndDropEnabled: false,
      isColorbar: false,
      maxDrawUndoBitmaps: 1,
      logLevel: "error",
    });
    await page.viewer.attachToCanvas($("canvas"));
    page.viewer.onLocationChange = showPosition;
    $("canvas").addEventListener("mousemove", hover);
    $("canvas").addEventListener("keydown", press, true);
  }
  const viewer = page.viewer;
  if (viewer.drawBitmap) viewer.closeDrawing();
  await viewer.loadVolumes([{ url, name: "scan.nii", colormap: "gray" }]);
  viewer.scene.crosshairPos = [0.5, 0.5, 0.5];
  setView();
  setWindow();
}

function setView() {
  page.viewer.setSliceType(Number($("view").value));
  showPosition();
}

function setWindow() {
  const volume = page.viewer && page.viewer.volumes[0];
  if (!volume) return;
  [volume.cal_min, volume.cal_max] = page.model.windows[$("window").value];
  page.viewer.updateGLVolume();
}

// --- the position

function plane() {
  const type = Number($("view").value);
  return type < PLANES.length ? type : 0; // of three planes, the slider moves the axial one
}

function slices() {
  // How many slices the plane has, and which one is shown, from 0.
  const axis = ALONG[plane()];
  return [page.viewer.volumes[0].dimsRAS[axis + 1], page.viewer.frac2vox(page.viewer.scene.crosshairPos)[axis]];
}

function goToSlice(index) {
  const [count, current] = slices();
  const step = [0, 0, 0];
  step[ALONG[plane()]] = Math.min(count - 1, Math.max(0, index)) - current;
  page.viewer.moveCrosshairInVox(...step);
}

function words(mm) {
  // RAS mm as a reader says it: the viewer counts to the right and to the front.
  return [["R", "L"], ["A", "P"], ["F", "H"]].map(([less, more], axis) => {
    const number = axis === 2 ? mm[2] : -mm[axis];
    return `${Math.abs(number).toFixed(0)} ${number < 0 ? less : more}`;
  }).join(", ");
}

function valueAt(fraction) {
  const voxel = page.viewer.frac2vox(fraction);
  return Math.round(page.viewer.volumes[0].getValue(voxel[0], voxel[1], voxel[2]));
}

let spoken;
function showPosition() {
  const viewer = page.viewer;
  if (!viewer.volumes.length) return;
  const cross = viewer.scene.crosshairPos;
  const [count, index] = slices();
  const slider = $("slice");
  [slider.min, slider.max, slider.value] = [1, count, index + 1];
  const shown = `${index + 1} / ${count}`;
  $("slice-number").textContent = shown;
  slider.setAttribute("aria-valuetext", `${PLANES[plane()]} slice ${index + 1} of ${count}`);
  const text = `${valueAt(cross)} HU at ${words(viewer.frac2mm(cross))} mm`;
  $("cross").textContent = `Cross: ${text}`;
  clearTimeout(spoken); // a screen reader hears where a movement ends, not each step
  spoken = setTimeout(() => ($("position").textContent = `${PLANES[plane()]} slice ${index + 1} of ${count}, ${text}`), 500);
}

function hover(event) {
  const viewer = page.viewer;
  if (!viewer.volumes.length) return;
  const scale = viewer.uiData?.dpr || window.devicePixelRatio || 1;
  const [x, y] = [event.offsetX * scale, event.offsetY * scale];
  const tile = viewer.tileIndex(x, y);
  const fraction = tile < 0 ? [-1] : viewer.screenXY2TextureFrac(x, y, tile, true);
  $("hover").textContent = fraction[0] < 0 ? "–" : `${valueAt(fraction)} HU at ${words(viewer.frac2mm(fraction))} mm`;
}

function press(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || !page.viewer.volumes.length) return;
  const [count, index] = slices();
  const targets = {
    ArrowUp: index + 1, ArrowRight: index + 1, ArrowDown: index - 1, ArrowLeft: index - 1,
    PageUp: index + 10, PageDown: index - 10, Home: 0, End: count - 1,
  };
  if (event.key in targets) goToSlice(targets[event.key]);
  else if (!preset(event)) return;
  event.preventDefault();
  event.stopImmediatePropagation(); // NiiVue has other uses for the arrow keys
}

function preset(event) {
  const name = Object.keys(page.model.windows)[Number(event.key) - 1];
  if (!name || !/^[1-5]$/.test(event.key)) return false;
  $("window").value = name;
  setWindow();
  return true;
}

// --- the masks

async function drawMasks() {
  // All masks of the study, as the server has them now.
  const base = `api/studies/${page.study.study}`;
  const { masks } = await call("GET", `${base}/results`);
  const shown = new Map([...page.masks].map(([name, mask]) => [name, mask.shown]));
  page.masks = new Map(
    Object.entries(masks).map(([name, told]) => {
      return [name, { told, shown: shown.get(name) ?? true, url: `${base}/masks/${encodeURIComponent(told.file)}` }];
    }),
  );
  listMasks();
  const answer = await fetch(`${base}/labels.nii`);
  if (!answer.ok) throw new Error("The masks did not arrive.");
  const viewer = page.viewer;
  if (!viewer.drawBitmap) viewer.createEmptyDrawing();
  viewer.drawBitmap = labelsOf(await answer.arrayBuffer(), viewer.volumes[0]);
  viewer.refreshDrawing(false);
  paintMasks();
}

function labelsOf(file, scan) {
  // The voxels of an uncompressed NIfTI on the scan's grid as bytes in the viewer's order. NiiVue's own reading of a
  // drawing looks for percentiles and keeps a copy to undo, which takes longer than everything here.
  const header = new DataView(file);
  const [start, bits] = [header.getFloat32(108, true), header.getInt16(72, true)];
  const stored = bits === 8 ? new Uint8Array(file, start) : Uint8Array.from(new Uint16Array(file.slice(start)), slot);
  const [, width, height, depth] = scan.dimsRAS;
  const [right, front, up] = scan.img2RASstep;
  const first = scan.img2RASstart[0] + scan.img2RASstart[1] + scan.img2RASstart[2];
  const labels = new Uint8Array(width * height * depth);
  let index = 0;
  for (let k = 0; k < depth; k++) {
    for (let j = 0; j < height; j++) {
      let at = first + k * up + j * front;
      for (let i = 0; i < width; i++, at += right) labels[index++] = stored[at];
    }
  }
  return labels;
}

const slot = (number) => (number ? ((number - 1) % 255) + 1 : 0);

function paintMasks() {
  // Colours, opacity and outlines, without touching the voxels.
  const viewer = page.viewer;
  const lut = new Uint8ClampedArray(256 * 4);
  for (const { told, shown } of page.masks.values()) {
    const rgb = [1, 3, 5].map((start) => parseInt(told.colour.slice(start, start + 2), 16));
    lut.set([...rgb, shown ? 255 : 0], 4 * slot(told.number));
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
  const rows = [...page.masks].map(([name, mask]) => {
    const row = make("li");
    const box = make("input", undefined, { type: "checkbox", "aria-label": `show ${name}` });
    box.checked = mask.shown;
    box.addEventListener("change", () => {
      mask.shown = box.checked;
      paintMasks();
    });
    const size = mask.told.voxels ? `${mask.told.volume_ml.toFixed(1)} ml, ${Math.round(mask.told.mean_hu)} HU` : "nothing found";
    const go = make("button", "Go to", { type: "button", "aria-label": `go to ${name}` });
    go.disabled = !mask.told.voxels;
    go.addEventListener("click", () => goTo(mask));
    row.append(
      box,
      make("span", undefined, { class: "swatch", style: `background:${mask.told.colour}` }),
      make("span", `${name}: ${size}`, { class: "grow" }),
      go,
      make("a", "NIfTI", { href: mask.url, download: mask.told.file, "aria-label": `download ${name} as NIfTI` }),
    );
    return row;
  });
  $("masks").replaceChildren(...rows);
  $("seg-item").hidden = !(page.study.dicom && rows.length);
}

function goTo(mask) {
  page.viewer.scene.crosshairPos = page.viewer.mm2frac(mask.told.place_mm);
  page.viewer.drawScene();
  showPosition();
}

function startViewer() {
  $("view").addEventListener("change", setView);
  $("window").addEventListener("change", setWindow);
  $("opacity").addEventListener("input", paintMasks);
  $("outlines").addEventListener("change", paintMasks);
  $("slice").addEventListener("input", () => goToSlice(Number($("slice").value) - 1));
  $("slice").addEventListener("keydown", preset);
}
