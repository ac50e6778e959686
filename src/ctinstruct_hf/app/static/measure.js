// Measurements on the picture: distance, angle, HU in a circle, and the diameters of findings.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const NEEDED = { distance: 2, angle: 3, circle: 2 };
const measurements = []; // {tool, plane, points: RAS mm, words}
let begun = null;

const difference = (one, other) => one.map((value, axis) => value - other[axis]);
const length = (vector) => Math.hypot(...vector);
const middle = ([one, other]) => one.map((value, axis) => (value + other[axis]) / 2);

const pixelsPerUnit = () => page.viewer.uiData?.dpr || window.devicePixelRatio || 1; // of the canvas, to a unit of CSS

function pointAt(event) {
  // The plane under the mouse and the point there in RAS mm; null between the planes.
  const viewer = page.viewer;
  const scale = pixelsPerUnit();
  const [x, y] = [event.offsetX * scale, event.offsetY * scale];
  const tile = viewer.tileIndex(x, y);
  if (tile < 0) return null;
  const fraction = viewer.screenXY2TextureFrac(x, y, tile, true);
  if (fraction[0] < 0) return null;
  return { plane: viewer.screenSlices[tile].axCorSag, fraction, mm: [...viewer.frac2mm(fraction)].slice(0, 3) };
}

function onScreen(mm, plane) {
  // Where a point is on the overlay; null where its slice is not the one that the plane shows.
  const viewer = page.viewer;
  const axis = ALONG[plane];
  const fraction = viewer.mm2frac(mm);
  if (viewer.frac2vox(fraction)[axis] !== viewer.frac2vox(viewer.scene.crosshairPos)[axis]) return null;
  fraction[axis] = viewer.scene.crosshairPos[axis];
  const found = viewer.frac2canvasPosWithTile(fraction, plane);
  const scale = pixelsPerUnit();
  return found && found.pos.map((value) => value / scale);
}

function huInCircle(centre, edge, plane) {
  // Mean and standard deviation of the HU within a circle, and how many voxels those are.
  const viewer = page.viewer;
  const volume = viewer.volumes[0];
  const start = viewer.frac2vox(viewer.mm2frac(centre));
  const radius = length(difference(edge, centre));
  const [u, v] = [0, 1, 2].filter((axis) => axis !== ALONG[plane]);
  const values = [];
  const reach = [u, v].map((axis) => Math.ceil(radius / volume.pixDimsRAS[axis + 1]));
  for (let a = -reach[0]; a <= reach[0]; a++) {
    for (let b = -reach[1]; b <= reach[1]; b++) {
      const voxel = [...start];
      voxel[u] += a;
      voxel[v] += b;
      if ([u, v].some((axis) => voxel[axis] < 0 || voxel[axis] >= volume.dimsRAS[axis + 1])) continue;
      if (length(difference([...viewer.vox2mm(voxel, volume.matRAS)].slice(0, 3), centre)) <= radius) values.push(volume.getValue(...voxel));
    }
  }
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const sd = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
  return { mean, sd, count: values.length, radius };
}

function wordsFor({ tool, points, plane }) {
  if (tool === "distance") return `${length(difference(points[1], points[0])).toFixed(1)} mm`;
  if (tool === "angle") {
    const [one, other] = [difference(points[0], points[1]), difference(points[2], points[1])];
    const cosine = one.reduce((sum, value, axis) => sum + value * other[axis], 0) / (length(one) * length(other));
    return `${((Math.acos(Math.min(1, Math.max(-1, cosine))) * 180) / Math.PI).toFixed(1)}°`;
  }
  const { mean, sd, count, radius } = huInCircle(points[0], points[1], plane);
  return count ? `${mean.toFixed(0)} ± ${sd.toFixed(0)} HU, ${(2 * radius).toFixed(1)} mm across` : "no voxel";
}

function addPoint(event) {
  const found = pointAt(event);
  if (!found || event.button) return;
  event.preventDefault();
  const tool = $("tool").value;
  if (!begun || begun.tool !== tool || begun.plane !== found.plane) begun = { tool, plane: found.plane, points: [] };
  begun.points.push(found.mm);
  if (begun.points.length === NEEDED[tool]) {
    measurements.push({ ...begun, words: wordsFor(begun) });
    begun = null;
    $("clear").hidden = false;
    $("measured").replaceChildren(...measurements.map((one) => make("li", `${one.tool}: ${one.words}`)));
  }
  drawMeasurements();
}

function stretch(event) {
  hover(event);
  if (!begun) return;
  const found = pointAt(event);
  if (found && found.plane === begun.plane) drawMeasurements({ ...begun, points: [...begun.points, found.mm] });
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function drawMeasurements(growing = begun) {
  const drawn = [];
  const line = (points, colour) => drawn.push(shape("polyline", { points: points.map((one) => one.join(",")).join(" "), stroke: colour }));
  const label = ([x, y], words) => {
    const text = shape("text", { x: x + 6, y: y - 6 });
    text.textContent = words;
    drawn.push(text);
  };
  for (const one of [...measurements, ...(growing ? [growing] : [])]) {
    const points = one.points.map((mm) => onScreen(mm, one.plane));
    if (points.some((point) => !point)) continue;
    if (one.tool === "circle" && points.length === 2) {
      const [[x, y], edge] = points;
      drawn.push(shape("circle", { cx: x, cy: y, r: length(difference(edge, points[0])) }));
    } else line(points, "#ffd60a");
    if (one.words) label(points[points.length - 1], one.words);
  }
  if ($("diameters").checked) {
    for (const { measured, shown } of page.masks.values()) {
      const ends = measured.lines_mm.map((pair) => pair.map((mm) => onScreen(mm, 0)));
      if (!shown || !ends.length || ends.flat().some((point) => !point)) continue;
      for (const pair of ends) line(pair, "#ffffff");
      label(ends[0][1], measured.lines_mm.map(([one, other]) => length(difference(one, other)).toFixed(0)).join(" × ") + " mm");
    }
  }
  $("drawn").replaceChildren(...drawn);
}

function clearMeasurements() {
  measurements.length = 0;
  begun = null;
  $("clear").hidden = true;
  $("measured").replaceChildren();
  $("drawn").replaceChildren();
}

function startMeasuring() {
  const overlay = $("drawn");
  $("tool").addEventListener("change", () => {
    begun = null;
    overlay.classList.toggle("active", $("tool").value !== "");
    drawMeasurements();
  });
  overlay.addEventListener("pointerdown", addPoint);
  overlay.addEventListener("pointermove", stretch);
  overlay.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [, index] = slices();
    goToSlice(index + Math.sign(event.deltaY));
  }, { passive: false });
  $("clear").addEventListener("click", () => {
    clearMeasurements();
    drawMeasurements();
  });
  $("diameters").addEventListener("change", () => drawMeasurements());
}
